"""The English prose and the small tokenizer that ship with memzoo."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

__all__ = ["load_tokenizer", "prose", "tokenizer_path"]

FOLDER = Path(__file__).resolve().parent
TEST_SHARE = 0.1


@cache
def prose(split: str | None = None) -> str:
    """Four novels by Jane Austen as plain text, one paragraph a line (`PROSE.md` names the source): about 2.2 million characters.

    Args:
        split: "train" for the first nine tenths, "test" for the last tenth, None for all of it. The cut is between paragraphs.

    Raises:
        ValueError: an unknown split.
    """
    if split not in (None, "train", "test"):
        raise ValueError(f"prose: split is {split!r}, needs 'train', 'test' or None")
    if split is None:
        return lzma.decompress((FOLDER / "prose.txt.xz").read_bytes()).decode("utf-8")
    text = prose()
    cut = text.rindex("\n", 0, int(len(text) * (1 - TEST_SHARE))) + 1
    return text[:cut] if split == "train" else text[cut:]


def tokenizer_path() -> str:
    """Folder of the tokenizer that ships with memzoo: byte-level BPE, 4,096 symbols, for `AutoTokenizer.from_pretrained`."""
    return str(FOLDER / "tokenizer")


def load_tokenizer(name_or_path: str | Path | None = None, *, trust_remote_code: bool = False):
    """A fast tokenizer by folder or hub name; without a name, the one that ships with memzoo.

    It pads on the left, as generation in batches needs.

    Raises:
        ValueError: there is no tokenizer there, in one line.
    """
    from transformers import AutoTokenizer

    name = str(name_or_path) if name_or_path is not None else tokenizer_path()
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab.*")):
        raise ValueError(f"load_tokenizer: the folder {name} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"load_tokenizer: no tokenizer at {name!r}: {reason}") from error
    if not tokenizer("The grass is green.").input_ids:
        raise ValueError(f"load_tokenizer: the tokenizer at {name!r} has no vocabulary")
    return tokenizer
