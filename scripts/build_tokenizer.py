"""Rebuilds memzoo/data/tokenizer: byte-level BPE of 4,096 symbols on the training prose, made so that needles are short.

    python scripts/build_tokenizer.py [--output FOLDER]

What is particular to it, all through pre-tokenisation and counts, so that any text still makes the round trip:

- A space belongs to the word, number or mark after it, so text can be cut and joined at spaces without changing a token.
- Digits are cut into groups of two, the first with its space: the 220 symbols " 0".." 99", "0".."99" cover every number, and a
  7-digit value is 4 tokens. Groups of three would also be 4 tokens (the space alone, then 3 + 3 + 1) or need 2,220 symbols, and a small
  model would see each of them ten times less often.
- A mark belongs to the letters after it, and every word a key is made of is one symbol: "brave-tiger" is " brave", "-tiger".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from memzoo.data.niah import FORMATS, HEADER, NEEDLE, PREFIX, QUESTION
from memzoo.data.text import prose, tokenizer_path
from memzoo.data.words import ADJECTIVES, NOUNS

SIZE = 4096
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)\b"  # English contractions
    r"| ?\p{N}{1,2}"  # digits in pairs, the first with its space
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters with the space or mark before them
    r"| ?[^\s\p{L}\p{N}]+"  # other marks
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SURE = 200  # a pair this frequent is merged long before the last symbol is given out


def corpus() -> Iterator[str]:
    yield from prose("train").splitlines(keepends=True)
    for group in [str(n) for n in range(10)] + [f"{n:02d}" for n in range(100)]:
        yield f" {group}\n{group}\n" * SURE
    for word in ADJECTIVES:
        yield f" {word}\n" * SURE
    for word in NOUNS:
        yield f" {word}\n-{word}\n" * SURE
    for form in (FORMATS[f"niah_single_{number}"] for number in (1, 2, 3)):  # the templates that training documents have
        for template in (HEADER, NEEDLE, QUESTION, PREFIX):
            yield (template.format(plural=form.values, singular=form.values[:-1], key="", value="") + "\n") * SURE


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tokenizer_path()))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(args.output / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": int(1e12),
    }
    (args.output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = prose("test")
    print(f"{args.output}: {tokenizer.get_vocab_size()} symbols, {len(text) / len(tokenizer.encode(text)):.2f} characters a token")


if __name__ == "__main__":
    main()
