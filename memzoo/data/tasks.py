"""Every scored task by name: how its documents are made, how an answer is scored, what may be made easier; and the suites they form."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .babi import TASKS as BABI
from .babi import make_babi, score_label
from .held_out import make_held_out
from .mqar import make_mqar
from .niah import FORMATS, make_sample, needle_cells, needle_sample
from .niah import score as score_values
from .ruler import make_cwe, make_fwe, make_vt
from .symbols import make_copy, make_denoise, make_selective_copy, make_transfer

__all__ = ["SUITES", "TASKS", "SuiteTask", "documents", "find_tasks", "requests_of"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (512, 1024, 2048, 4096)
DELAYS = (100, 200, 400, 1000, 2000, 5000)


@dataclass(frozen=True)
class SuiteTask:
    """One scored task.

    Attributes:
        name, suite: the task, and the suite it is a part of.
        make: make(tokenizer, length, rng, **difficulty) gives a sample: input, gen_prefix, outputs, length, tokens and what it adds.
        score: score(sample, answer) from 0 to 1.
        kind: "generate" (the answer is generated), "recall" (each of several values must be the first choice) or "loss".
        answer_tokens: most tokens that are generated.
        until: texts that end an answer.
        monotone: whether saying more never lowers a score of 1, so that generation may stop once it is reached.
        delimiter: what stands between the input and the answer's prefix.
        lengths: lengths in tokens if none are asked for.
        depths: whether documents are made for depths of a needle.
    """

    name: str
    suite: str
    make: Callable[..., dict]
    score: Callable[[dict, str], float]
    kind: str = "generate"
    answer_tokens: int = 16
    until: tuple[str, ...] = ()
    monotone: bool = False
    delimiter: str = " "
    lengths: tuple[int, ...] = LENGTHS
    depths: bool = False

    @property
    def difficulty(self) -> dict[str, object]:
        """What may be made easier, with the defaults that published numbers have."""
        parameters = inspect.signature(self.make).parameters.values()
        hidden = ("split", "answer_tokens")
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden}

    @property
    def metric(self) -> str:
        return "bits_per_byte" if self.kind == "loss" else "accuracy"

    def most_tokens(self, sample: dict, cap: int | None = None) -> int:
        """Tokens to generate for a sample, `cap` or the task's own; symbols are one token each, so never more than there are."""
        cap = self.answer_tokens if cap is None else cap
        return min(cap, len(sample["outputs"])) if self.score is score_words else cap


def score_words(sample: dict, answer: str) -> float:
    """The share of places where the answer's word is the right one."""
    said = answer.split()
    return sum(a == b for a, b in zip(said, sample["outputs"])) / len(sample["outputs"])


def _no_score(sample: dict, answer: str) -> float:
    raise TypeError("this task has no answers to score")


def _tasks() -> Iterator[SuiteTask]:
    for name, form in FORMATS.items():
        make = partial(make_sample, name)
        yield SuiteTask(name, "niah", make, score_values, answer_tokens=form.answer_tokens, monotone=True, depths=True)
    yield SuiteTask("vt", "vt", make_vt, score_values, answer_tokens=30, monotone=True)
    yield SuiteTask("cwe", "cwe", make_cwe, score_values, answer_tokens=120, monotone=True, delimiter="\n\n")
    yield SuiteTask("fwe", "fwe", make_fwe, score_values, answer_tokens=50, monotone=True)
    yield SuiteTask("mqar", "mqar", make_mqar, _no_score, kind="recall", lengths=(64, 128, 256, 512))
    yield SuiteTask("selective_copy", "selective_copy", make_selective_copy, score_words)
    yield SuiteTask("copy", "copy", make_copy, score_words)
    yield SuiteTask("denoise", "denoise", make_denoise, score_words)
    yield SuiteTask("transfer", "transfer", make_transfer, score_words, lengths=tuple(delay + 21 for delay in DELAYS))
    for name in BABI:
        yield SuiteTask(name, "babi_long", partial(make_babi, name), score_label, answer_tokens=8, until=("\n",))
    yield SuiteTask("ppl_by_length", "ppl_by_length", make_held_out, _no_score, kind="loss")


TASKS: dict[str, SuiteTask] = {task.name: task for task in _tasks()}
SUITES: dict[str, tuple[str, ...]] = {}
for _task in TASKS.values():
    SUITES[_task.suite] = (*SUITES.get(_task.suite, ()), _task.name)


def find_tasks(name: str) -> list[SuiteTask]:
    """The tasks of a suite, or the one task of that name.

    Raises:
        ValueError: neither exists, with the suites there are.
    """
    if name in SUITES:
        return [TASKS[task] for task in SUITES[name]]
    if name in TASKS:
        return [TASKS[name]]
    raise ValueError(f"unknown suite or task {name!r}, needs one of {', '.join(SUITES)}, or a task of theirs")


def documents(
    task: str,
    tokenizer,
    length: int,
    count: int,
    seed: int = 0,
    *,
    depths: Sequence[float] = DEPTHS,
    **difficulty,
) -> Iterator[dict]:
    """`count` documents of a task and length, for needles shared out among the depths.

    A document depends on the seed, the task, the length and its number only (and its depth), so that more of them are the same and others.

    Raises:
        ValueError: an unknown task or difficulty, a length that does not fit, no documents asked for.
    """
    (found,) = [TASKS[task]] if task in TASKS else find_tasks(task)
    unknown = [key for key in difficulty if key not in found.difficulty]
    if unknown:
        raise ValueError(f"{task} has no setting {unknown[0]!r}, has {', '.join(found.difficulty) or 'none'}")
    if count < 1 or length < 1:
        raise ValueError(f"{task}: no documents to make, length is {length} and count {count}")
    if found.depths:
        if not depths:
            raise ValueError(f"{task}: no documents to make, there are no depths")
        for depth, number in needle_cells(task, depths, count):
            yield needle_sample(task, tokenizer, length, depth, number, seed, **difficulty)
        return
    for number in range(count):
        rng = np.random.default_rng([seed, length, zlib.crc32(task.encode()), number])
        yield found.make(tokenizer, length, rng, **difficulty)


def requests_of(task: str, document: dict) -> list[tuple[str, str]]:
    """(context, continuation) of each log-likelihood that a document asks for."""
    text = document["input"]
    if TASKS[task].kind == "recall":
        return [(text[:end], f" {value}") for end, value in zip(document["queries"], document["outputs"])]
    return [(text[:a], text[a:b]) for a, b in zip(document["cuts"], document["cuts"][1:])]
