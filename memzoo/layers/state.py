"""What one layer remembers between calls: named states of fixed size, and rows of keys and values that grow with the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import TokenLayout


class LayerState:
    """States by name, each with the batch as its leading axis, and optionally a growing store of rows.

    Rows are kept dense and right-aligned, [B, S, ...]: sequence b has its `S - pad[b]` real rows at the end, and whatever stands before
    them is never read. So a decode step appends one row everywhere, whatever padding the prompts had.
    """

    def __init__(self) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.pad: Tensor | None = None  # rows before each sequence's first, [B]; None if all are 0
        self.open: int | Tensor = 0  # tokens in the open segment, where a memory has segments: one number while all agree, else [B]
        self.closed: int | Tensor = 0  # memories of closed segments that are cached, counted likewise

    def get(self, name: str) -> Tensor | None:
        """The state of fixed size under this name, or None before the first call."""
        return self.fixed.get(name)

    def set(self, name: str, value: Tensor) -> None:
        self.fixed[name] = value

    def append(self, new: dict[str, Tensor], layout: TokenLayout, keep: int | None = None) -> tuple[dict[str, Tensor], KeyLayout]:
        """Append the rows of this call's tokens; return all rows to read and how they lie.

        Args:
            new: tensors [B, T, ...] or packed [1, total, ...], as `layout` says.
            layout: the tokens of this call.
            keep: rows to keep for later calls, counted from the end; None for all.

        Returns:
            (rows by name, [B, S, ...] or packed [1, total, ...]; their layout for the `attention` operator).
        """
        if layout.cu_seqlens is None:
            if self.rows:
                full = {name: torch.cat((self.rows[name], rows), dim=1) for name, rows in new.items()}
            else:
                full = dict(new)
            read, keys = full, KeyLayout.of(full, self.pad, layout)
        else:
            empty = not self.rows
            full = self._append_packed(new, layout.cu_seqlens)
            # The first call's own rows are already packed: reading those saves a pass over the padded copy.
            read, keys = (new, KeyLayout(layout.cu_seqlens, None)) if empty else (full, KeyLayout.of(full, self.pad, layout))
        length = next(iter(full.values())).shape[1]
        if keep is not None and length > keep:
            full = {name: rows[:, length - keep :] for name, rows in full.items()}
            if self.pad is not None:
                self.pad = (self.pad - (length - keep)).clamp(min=0)
        self.rows = full
        return read, keys

    def clear(self, done: Tensor | None = None) -> None:
        """Forget the rows of the sequences that are `done` [B]; of all if None."""
        if done is None:
            self.rows, self.pad = {}, None
        elif self.rows:
            size = next(iter(self.rows.values())).shape[1]
            pad = torch.zeros_like(done, dtype=torch.int64) if self.pad is None else self.pad
            self.pad = torch.where(done, size, pad)

    def _append_packed(self, new: dict[str, Tensor], cu_seqlens: Tensor) -> dict[str, Tensor]:
        added = cu_seqlens[1:] - cu_seqlens[:-1]
        batch = added.numel()
        old_size = next(iter(self.rows.values())).shape[1] if self.rows else 0
        pad = torch.zeros_like(added) if self.pad is None else self.pad
        had = old_size - pad
        lengths = had + added
        size = int(lengths.max())
        # Output row j of sequence b is its real row r: one of the old ones if r < had, else one of the new.
        r = torch.arange(size, device=added.device) - (size - lengths)[:, None]
        old = torch.arange(batch, device=added.device)[:, None] * old_size + pad[:, None] + r
        fresh = batch * old_size + cu_seqlens[:-1, None] + r - had[:, None]
        index = torch.where(r < 0, 0, torch.where(r < had[:, None], old, fresh))
        full = {}
        for name, rows in new.items():
            source = rows[0] if not self.rows else torch.cat((self.rows[name].flatten(0, 1), rows[0]))
            full[name] = source[index] if source.shape[0] else rows.new_zeros(batch, size, *rows.shape[2:])
        self.pad = size - lengths
        return full

    def tensors(self) -> list[Tensor]:
        counts = [t for t in (self.pad, self.open, self.closed) if isinstance(t, Tensor)]
        return [*self.fixed.values(), *self.rows.values(), *counts]

    def apply(self, change) -> None:
        """Replace every tensor by `change(tensor)`, such as a selection of the batch."""
        self.fixed = {name: change(value) for name, value in self.fixed.items()}
        self.rows = {name: change(value) for name, value in self.rows.items()}
        if self.pad is not None:
            self.pad = change(self.pad)
        if isinstance(self.open, Tensor):
            self.open = change(self.open)
        if isinstance(self.closed, Tensor):
            self.closed = change(self.closed)

    def bytes(self) -> int:
        """Bytes held, of the whole batch."""
        return sum(t.numel() * t.element_size() for t in [*self.fixed.values(), *self.rows.values()])


class KeyLayout:
    """How queries and stored rows pair up: `cu_seqlens` for the `attention` operator, and the row size when the store is dense."""

    def __init__(self, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None, dense: tuple[int, int] | None):
        self.cu_seqlens, self.dense = cu_seqlens, dense

    @classmethod
    def of(cls, rows: dict[str, Tensor], pad: Tensor | None, layout: TokenLayout) -> KeyLayout:
        batch, size = next(iter(rows.values())).shape[:2]
        if pad is None and layout.cu_seqlens is None:
            return cls(None, None)
        if pad is None:
            pad = layout.cu_seqlens.new_zeros(batch)
        # The store [B, S] is read in place as one packed row of B * S keys. Each sequence's pads count as a sequence of their own, which
        # has keys and no query, so nothing reads them and nothing is copied.
        starts = torch.arange(batch + 1, device=pad.device, dtype=pad.dtype) * size
        key_ends = torch.stack((starts[:-1], starts[:-1] + pad), dim=1).flatten()
        query_ends = layout.cu_seqlens
        if query_ends is None:
            query_ends = torch.arange(batch + 1, device=pad.device, dtype=pad.dtype) * layout.position_ids.shape[1]
        query_ends = torch.stack((query_ends[:-1], query_ends[:-1]), dim=1).flatten()
        return cls((torch.cat((query_ends, _last(layout, batch, pad))), torch.cat((key_ends, starts[-1:]))), (batch, size))


def _last(layout: TokenLayout, batch: int, like: Tensor) -> Tensor:
    if layout.cu_seqlens is not None:
        return layout.cu_seqlens[-1:]
    return like.new_full((1,), batch * layout.position_ids.shape[1])
