"""Attention over blocks of queries in plain torch, each against the keys it can see; the backward computes the weights again.

Nothing of size Tq x Tk outlives a block. Attention without options runs on torch's own blockwise kernel for CPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**18  # scores a block holds at a time: they are passed over several times, so they should stay in a core's cache
MIN_BLOCK, MAX_BLOCK = 32, 256  # query rows


def attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_modes: Tensor | None,
    scale: float,
    window: int | None,
    prefix: int,
    key_strength: Tensor | None,
    log_retention: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if cu_seqlens is not None:
        return _packed(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_seqlens)
    return _rows(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, None)


def _rows(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, offsets) -> Tensor:
    """Rows of one length each; `offsets` [B] are the positions of the rows' first queries, Tk - Tq if None."""
    plain = window is None and read_modes is None and key_strength is None and log_retention is None and offsets is None
    if plain and q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3] and q.device.type == "cpu":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)
    return _Blocks.apply(q, k, v, read_modes, key_strength, log_retention, offsets, scale, window, prefix)


def retention_bias(log_retention: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`c` in float64, [B, Tk, Hq], such that older rows fade by `c_t - c_i`: the running sum inside each sequence."""
    total = log_retention.double().cumsum(1)
    if cu_seqlens is None:
        return total
    return total - _at_start(total, cu_seqlens)


def retention_gradient(column_sums: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Gradient of log_retention from the sums over queries of the scores' gradients, both [B, Tk, Hq].

    A row of scores' gradients sums to 0, so entry m, the sum over keys before m and queries from m on, is that over keys before m alone.
    """
    total = column_sums.double().cumsum(1)
    before = F.pad(total[:, :-1], (0, 0, 1, 0))
    if cu_seqlens is None:
        return before
    return before - _at_start(total, cu_seqlens)


def _at_start(total: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The running sum just before the sequence of each packed token, [1, Tk, H]."""
    from ..common.packing import sequence_ids

    before = F.pad(total[0], (0, 0, 1, 0))
    return before[cu_seqlens.long()[sequence_ids(cu_seqlens, total.shape[1])]][None]


class _Block:
    """One block of query rows: the key columns it can see, and which of its scores are hidden.

    The columns are one range, or the prefix and the window's range. With temporal links each range takes in one key more (hidden)
    towards its neighbours, since those rows' values are read.
    """

    def __init__(self, start, stop, queries, keys, window, prefix, links, offsets, device):
        self.rows = slice(start, stop)
        shift = keys - queries
        if offsets is None:
            first, last = shift + start, shift + stop
        else:
            first, last = int(offsets.min()) + start, min(int(offsets.max()) + stop, keys)
        low = 0 if window is None else max(first - window + 1 - links, 0)
        ahead = min(prefix + links, last) if prefix else 0
        if low <= ahead:
            self.ranges = [slice(0, last)]
            columns = torch.arange(last, device=device)
        else:
            self.ranges = [slice(0, ahead)] * (ahead > 0) + [slice(low, last)]
            columns = torch.cat([torch.arange(r.start, r.stop, device=device) for r in self.ranges])
        rows = torch.arange(start, stop, device=device)[:, None]
        rows = rows + shift if offsets is None else (rows + offsets.view(-1, 1, 1, 1, 1)).clamp(max=last - 1)
        # Without a window only the last columns can be hidden.
        self.masked = slice(first, None) if window is None else slice(None)
        self.future = columns > rows
        self.hidden = self.future[..., self.masked]
        if window is not None:
            self.hidden = self.hidden | ((columns <= rows - window) & (columns >= prefix))

    def take(self, x: Tensor) -> Tensor:
        """The block's columns of x [..., Tk, D]."""
        parts = [x[..., r, :] for r in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Adds to the block's columns of `total` [..., Tk, D]."""
        parts = part.split([r.stop - r.start for r in self.ranges], dim=-2)
        for r, values in zip(self.ranges, parts):
            total[..., r, :] += values

    def weights(self, q: Tensor, k: Tensor, fade: tuple[Tensor, Tensor] | None) -> Tensor:
        """Softmax weights [B, Hk, G, M, K] of queries [B, Hk, G, Tq, D] (scaled) over keys [B, Hk, Tk, D]."""
        scores = _join(q[..., self.rows, :]) @ self.take(k).transpose(-1, -2)
        scores = scores.view(*q.shape[:3], -1, scores.shape[-1])
        if fade is not None:
            of_queries, of_keys = fade[0][..., self.rows, :], self.take(fade[1])
            base = of_queries[..., :1, :]
            scores += (of_queries - base).to(scores.dtype)
            scores -= (of_keys - base).to(scores.dtype).transpose(-1, -2)
        scores[..., self.masked].masked_fill_(self.hidden, float("-inf"))
        return torch.softmax(scores, dim=-1)


def _join(x: Tensor) -> Tensor:
    """[B, Hk, G, M, D] to [B, Hk, G M, D]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _spread(weights: Tensor, modes: Tensor, future: Tensor) -> Tensor:
    """Weights on the values themselves: row j is read as i + 1 = j, i = j and i - 1 = j, in the three modes."""
    spread = weights * modes[..., 1:2]
    spread[..., :-1].addcmul_(weights[..., 1:], modes[..., 0:1])
    spread[..., 1:].addcmul_(weights[..., :-1], modes[..., 2:3])
    return spread.masked_fill_(future, 0)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, read_modes, key_strength, log_retention, offsets, scale, window, prefix):
        ctx.save_for_backward(q, k, v, read_modes, key_strength, log_retention, offsets)
        ctx.options = scale, window, prefix
        queries, keys, values, modes, _, fade = _head_major(q, k, v, read_modes, key_strength, log_retention, offsets, scale)
        parts = []
        for block in _blocks(q, k, window, prefix, read_modes is not None, offsets):
            weights = block.weights(queries, keys, fade)
            if modes is not None:
                weights = _spread(weights, modes[..., block.rows, :], block.future)
            part = _join(weights) @ block.take(values)
            parts.append(part.view(*weights.shape[:-1], -1))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        return y.to(q.dtype).flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, read_modes, key_strength, log_retention, offsets = ctx.saved_tensors
        scale, window, prefix = ctx.options
        queries, keys, values, modes, strength, fade = _head_major(q, k, v, read_modes, key_strength, log_retention, offsets, scale)
        dy = _grouped(dy.to(queries.dtype), k.shape[2])
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        dq, dmodes = [], []
        columns = None if fade is None else torch.zeros_like(fade[1])
        for block in _blocks(q, k, window, prefix, read_modes is not None, offsets):
            weights = block.weights(queries, keys, fade)
            grad = _join(dy[..., block.rows, :])
            seen = block.take(values)
            dweights = (grad @ seen.transpose(-1, -2)).view(weights.shape)
            if modes is None:
                block.add(dv, _join(weights).transpose(-1, -2) @ grad)
            else:
                mode = modes[..., block.rows, :]
                spread = _spread(weights, mode, block.future)
                block.add(dv, _join(spread).transpose(-1, -2) @ grad)
                dspread = dweights.masked_fill_(block.future, 0)
                content = weights * dspread
                dmodes.append(
                    torch.stack(
                        (
                            (weights[..., 1:] * dspread[..., :-1]).sum(-1),
                            content.sum(-1),
                            (weights[..., :-1] * dspread[..., 1:]).sum(-1),
                        ),
                        dim=-1,
                    )
                )
                dweights = dspread * mode[..., 1:2]
                dweights[..., 1:].addcmul_(dspread[..., :-1], mode[..., 0:1])
                dweights[..., :-1].addcmul_(dspread[..., 1:], mode[..., 2:3])
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            joined = _join(dscores)
            dq.append((joined @ block.take(keys)).view(*dscores.shape[:-1], -1))
            block.add(dk, joined.transpose(-1, -2) @ _join(queries[..., block.rows, :]))
            if columns is not None:
                block.add(columns, dscores.sum(-2).unsqueeze(-1).to(columns.dtype))
        dq = torch.cat(dq, dim=3)
        dstrength = dretention = None
        if strength is not None:
            plain = _grouped(q.to(dq.dtype), k.shape[2])
            dstrength = _ungrouped((dq * plain).sum(-1, keepdim=True) * scale)[..., 0].to(key_strength.dtype)
            dq = dq * strength
        if columns is not None:
            dretention = retention_gradient(_ungrouped(columns)[..., 0]).to(log_retention.dtype)
        return (
            _ungrouped(dq * scale).to(q.dtype),
            dk.transpose(1, 2).to(k.dtype),
            dv.transpose(1, 2).to(v.dtype),
            _ungrouped(torch.cat(dmodes, dim=3)).to(read_modes.dtype) if read_modes is not None else None,
            dstrength,
            dretention,
            None, None, None, None,
        )  # fmt: skip


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """[B, T, Hq, D] to [B, Hk, G, T, D], laid out so."""
    batch, length, heads, size = x.shape
    return x.transpose(1, 2).contiguous().view(batch, key_heads, heads // key_heads, length, size)


def _ungrouped(x: Tensor) -> Tensor:
    """[B, Hk, G, T, D] to [B, T, Hq, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def _head_major(q, k, v, read_modes, key_strength, log_retention, offsets, scale):
    """(scaled queries, keys, values, modes, strength, (fade of queries, fade of keys)), heads first, in the type to compute in."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = k.shape[2]
    queries = _grouped(q.to(wide), heads) * scale
    strength = None
    if key_strength is not None:
        strength = _grouped(key_strength.to(wide)[..., None], heads)
        queries = queries * strength
    modes = None if read_modes is None else _grouped(read_modes.to(wide), heads)
    fade = None
    if log_retention is not None:
        of_keys = retention_bias(log_retention)
        if offsets is None:
            of_queries = of_keys[:, k.shape[1] - q.shape[1] :]
        else:
            places = (offsets[:, None] + torch.arange(q.shape[1], device=q.device)).clamp(max=k.shape[1] - 1)
            of_queries = of_keys.gather(1, places[..., None].expand(-1, -1, of_keys.shape[2]))
        fade = _grouped(of_queries[..., None], heads), _grouped(of_keys[..., None], heads)
    keys, values = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
    return queries, keys, values, modes, strength, fade


def _blocks(q, k, window, prefix, links, offsets):
    queries, keys = q.shape[1], k.shape[1]
    seen = keys if window is None else min(window + prefix + MIN_BLOCK, keys)
    size = max(MIN_BLOCK, min(MAX_BLOCK, SCORES // (q.shape[0] * q.shape[2] * seen)))
    for start in range(0, queries, size):
        yield _Block(start, min(start + size, queries), queries, keys, window, prefix, int(links), offsets, q.device)


def _packed(q, k, v, read_modes, scale, window, prefix, key_strength, log_retention, cu_seqlens) -> Tensor:
    """Sequences of like length (a factor of two at most) become the rows of one call; those without queries take no part."""
    of_queries, of_keys = (cu.tolist() for cu in cu_seqlens)
    buckets: dict[int, list[int]] = {}
    for n in range(len(of_queries) - 1):
        if of_queries[n] < of_queries[n + 1]:
            buckets.setdefault((of_keys[n + 1] - of_keys[n] - 1).bit_length(), []).append(n)
    outputs, places = [], []
    for members in buckets.values():
        query_index, asked = _row_index(of_queries, members, q.device)
        key_index, held = _row_index(of_keys, members, q.device)
        offsets = None if torch.equal(asked, held) else held - asked

        def rows(x, index):
            return None if x is None else x[0].index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])

        y = _rows(
            rows(q, query_index), rows(k, key_index), rows(v, key_index), rows(read_modes, query_index), scale, window, prefix,
            rows(key_strength, query_index), rows(log_retention, key_index), offsets,
        )  # fmt: skip
        real = torch.arange(query_index.shape[1], device=q.device) < asked[:, None]
        outputs.append(y[real])
        places.append(query_index[real])
    order = torch.cat(places).argsort()
    return torch.cat(outputs).index_select(0, order)[None]


def _row_index(ends: list[int], members: list[int], device) -> tuple[Tensor, Tensor]:
    """Token indices of these sequences as rows, [n, longest], past a sequence's end its last token again; and their lengths [n]."""
    starts = torch.tensor([ends[n] for n in members], device=device)
    lengths = torch.tensor([ends[n + 1] - ends[n] for n in members], device=device)
    longest = max(ends[n + 1] - ends[n] for n in members)
    return starts[:, None] + torch.minimum(torch.arange(longest, device=device), lengths[:, None] - 1), lengths
