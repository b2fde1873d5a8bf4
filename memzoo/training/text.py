"""Text for training: found by name, tokenised with the datasets library, and cut into blocks of equal length."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from .errors import BadInput, refusing
from .loss import IGNORED

BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
MANY_DOCUMENTS = 100  # from here on whole documents are held out for evaluation; below, the last blocks


def local_files(name: str) -> tuple[str, list[str]] | None:
    """The datasets builder and the files of a local path, folder or glob; None if the name is not local."""
    path = Path(name)
    if path.is_dir():
        files = [str(f) for f in sorted(path.rglob("*")) if f.suffix.lower() in BUILDERS and f.is_file()]
        if not files:
            raise BadInput(f"--dataset {name}: the folder has no {', '.join(BUILDERS)} file")
    elif path.is_file():
        files = [name]
    elif any(c in name for c in "*?["):
        files = sorted(f for f in glob.glob(name, recursive=True) if Path(f).is_file())
        if not files:
            raise BadInput(f"--dataset {name}: no file matches")
    elif path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
        raise BadInput(f"--dataset {name}: there is no such file or folder")
    else:
        return None
    kinds = {BUILDERS.get(Path(f).suffix.lower()) for f in files}
    if None in kinds or len(kinds) > 1:
        found = ", ".join(sorted({Path(f).suffix or f for f in files}))
        raise BadInput(f"--dataset {name}: needs files of one kind, of {', '.join(BUILDERS)}; there are {found}")
    return kinds.pop(), files


def load_documents(name: str, *, config: str = "", split: str = "train", column: str = "text") -> datasets.Dataset:
    """One row a document, in a column "text"; raises BadInput if there is none with text in it. A text file is one document."""
    if name == "prose":
        from memzoo.data import prose

        return datasets.Dataset.from_dict({"text": [prose("train")]})
    local = local_files(name)
    with refusing(f"--dataset {name}", Exception):
        if local is not None:
            kind, files = local
            if all(Path(f).stat().st_size == 0 for f in files):
                raise BadInput(f"--dataset {name}: empty, there is no text in it")
            more = {"sample_by": "document"} if kind == "text" else {}
            rows = datasets.load_dataset(kind, data_files={"train": files}, split="train", **more)
        else:
            rows = datasets.load_dataset(name, config or None, split=split)
    if column not in rows.column_names:
        raise BadInput(f"--dataset {name}: has no column {column!r}; its columns: {', '.join(rows.column_names) or 'none'}")
    if rows.features[column].dtype not in ("string", "large_string"):
        raise BadInput(f"--dataset {name}: column {column!r} holds {rows.features[column].dtype}, needs strings")
    rows = rows.select_columns([column]).rename_column(column, "text") if column != "text" else rows.select_columns(["text"])
    if not any(text and not text.isspace() for text in _texts(rows)):
        raise BadInput(f"--dataset {name}: empty, there is no text in it")
    return rows


def _texts(rows: datasets.Dataset):
    for batch in rows.iter(batch_size=1000):
        yield from batch["text"]


def tokenize(documents: datasets.Dataset, tokenizer: Any, length: int, workers: int = 0) -> datasets.Dataset:
    """Rows of at most `length` tokens: `input_ids`, and `first`, true where a document begins. Documents end in the EOS token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pieces(batch: dict[str, list]) -> dict[str, list]:
        texts = [text for text in batch["text"] if text and not text.isspace()]
        out: dict[str, list] = {"input_ids": [], "first": []}
        if not texts:
            return out
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = list(ids) + end
            for start in range(0, len(ids), length):
                out["input_ids"].append(ids[start : start + length])
                out["first"].append(start == 0)
        return out

    return documents.map(
        pieces,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "first": datasets.Value("bool")}),
        num_proc=workers if workers > 1 and len(documents) > 256 else None,
        desc="tokenising",
    )


class Blocks(torch.utils.data.Dataset):
    """Documents laid end to end and cut into blocks of `length` tokens: `input_ids [length]`, `starts`, where documents begin."""

    def __init__(self, rows: datasets.Dataset, length: int):
        self.rows, self.length = rows.with_format("numpy"), length
        sizes = [len(ids) for ids in rows.with_format("arrow")["input_ids"]] if len(rows) else []
        self.ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.tokens // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, end = index * self.length, (index + 1) * self.length
        low = int(np.searchsorted(self.ends, begin, side="right"))
        high = int(np.searchsorted(self.ends, end, side="left"))
        rows = self.rows[low : high + 1]
        ids, starts = [], []
        position = int(self.ends[low - 1]) if low else 0
        for piece, first in zip(rows["input_ids"], rows["first"]):
            if first and begin < position < end:
                starts.append(position - begin)
            ids.append(piece[max(0, begin - position) : end - position])
            position += len(piece)
        return {
            "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            "starts": torch.tensor(starts, dtype=torch.long),
        }


def collate_concat(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks as rows, in which a document sees those before it."""
    ids = torch.stack([block["input_ids"] for block in blocks])
    return {"input_ids": ids, "labels": ids.clone()}


def collate_apart(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor | int]:
    """Blocks as one packed row [1, total] in which no document sees another, in the terms of transformers' packing collators."""
    ids = torch.cat([block["input_ids"] for block in blocks])
    offsets = np.cumsum([0] + [len(block["input_ids"]) for block in blocks])
    starts = [torch.cat([torch.tensor([offset]), block["starts"] + offset]) for offset, block in zip(offsets, blocks)]
    bounds = torch.cat([*starts, torch.tensor([len(ids)])])
    sizes = bounds.diff()
    labels = ids.clone()
    labels[bounds[:-1]] = IGNORED
    cu_seqlens, longest = bounds.to(torch.int32), int(sizes.max())
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": (torch.arange(len(ids)) - bounds[:-1].repeat_interleave(sizes))[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
