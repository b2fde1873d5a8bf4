"""lm-eval's side of the suites: documents from `--metadata`, requests, scores by length, depth and position."""

from __future__ import annotations

import math
from functools import partial

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from ..data.tasks import DEPTHS, TASKS, documents, requests_of
from ..data.text import load_tokenizer

__all__ = ["PREFIX", "MemzooTask", "bits_per_byte"]

PREFIX = "memzoo_"
NOT_SCORED = -1.0
SAMPLES = 10


def build(task: str, **metadata) -> dict[str, Dataset]:
    """The test documents of a task.

    Metadata: max_seq_lengths; samples for each length, and for needles each depth; depths; seed; tokenizer; the task's difficulty.
    """
    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained") or metadata.get("model")
    if not isinstance(tokenizer, str):
        raise ValueError(f'{PREFIX}{task} sizes its documents by tokens: pass --metadata \'{{"tokenizer": "..."}}\'')
    tokenizer = load_tokenizer(tokenizer, trust_remote_code=str(metadata.get("trust_remote_code")).lower() == "true")
    found = TASKS[task]
    difficulty = {key: metadata[key] for key in found.difficulty if key in metadata}
    depths = metadata.get("depths", DEPTHS)
    count = metadata.get("samples", SAMPLES) * (len(depths) if found.depths else 1)
    lengths = metadata.get("max_seq_lengths", found.lengths)
    made = [
        document
        for length in lengths
        for document in documents(task, tokenizer, int(length), count, metadata.get("seed", 0), depths=depths, **difficulty)
    ]
    return {"test": Dataset.from_list([{**document, "monotone": found.monotone} for document in made])}


def bits_per_byte(pieces: list[tuple[float, int]]) -> float:
    """Of (log-likelihood, bytes) pieces together, a byte; -1 of none."""
    scored = [piece for piece in pieces if piece != NOT_SCORED]
    size = sum(count for _, count in scored)
    return -sum(chance for chance, _ in scored) / math.log(2) / size if size else NOT_SCORED


def loss(pieces: list[tuple[float, int]]) -> float:
    """Of (log-likelihood, tokens) pieces together, a token in nats; -1 of none."""
    value = bits_per_byte(pieces)
    return value if value == NOT_SCORED else value * math.log(2)


def mean_of_scored(values: list[float]) -> float:
    """The mean over the documents that belong to this length or depth; the others are marked -1 and left out."""
    scored = [value for value in values if value != NOT_SCORED]
    return sum(scored) / len(scored) if scored else NOT_SCORED


class MemzooTask(ConfigurableTask):
    """A task of `memzoo.data.tasks` for lm-eval, by its name with the prefix "memzoo_".

    Reports `acc`, and `length_<tokens>` and `depth_<share>` for the lengths and depths its documents have; for losses `bits_per_byte`,
    `loss` in nats a token, `length_<tokens>` and `from_<position>`, bits per byte of the bucket of positions that starts there.
    """

    def __init__(self, config: dict) -> None:
        given = {key: value for key, value in config.items() if key != "class"}
        self.task = task = TASKS[given["task"].removeprefix(PREFIX)]
        generate = task.kind == "generate"
        settings = {
            "custom_dataset": partial(build, task.name),
            "dataset_path": "",
            "dataset_name": "",
            "test_split": "test",
            "output_type": "generate_until" if generate else "loglikelihood",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}" if task.kind != "loss" else "{{tokens}}",
            "target_delimiter": task.delimiter,
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
        if generate:
            settings["gen_prefix"] = "{{gen_prefix}}"
            settings["generation_kwargs"] = {"do_sample": False, "max_gen_toks": task.answer_tokens, "until": list(task.until)}
        super().__init__(config={**settings, **given})
        test = self.dataset["test"]
        self.lengths = [f"length_{length}" for length in sorted(set(test["length"]))]
        depths = {depth for depth in test["depth"] if depth is not None} if "depth" in test.column_names else ()
        self.depths = [f"depth_{depth:g}" for depth in sorted(depths)]
        if task.kind == "loss":
            self.depths = [f"from_{edge}" for edge in sorted({edge for edges in test["buckets"] for edge in edges[:-1]})]

    def construct_requests(self, doc: dict, ctx: str, **kwargs):
        if self.task.kind == "generate":
            request = super().construct_requests(doc, ctx, **kwargs)
            context, settings = request.arguments
            request.arguments = (context, {**settings, "max_gen_toks": self.task.most_tokens(doc, settings["max_gen_toks"])})
            return request
        kept = {key: value for key, value in kwargs.items() if key == "metadata"}
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=index, **kept)
            for index, pair in enumerate(requests_of(self.task.name, doc))
        ]

    def process_results(self, doc: dict, results: list) -> dict[str, float]:
        if self.task.kind == "loss":
            return self._losses(doc, results)
        if self.task.kind == "recall":
            value = sum(first for _, first in results) / len(results)
        else:
            value = self.task.score(doc, results[0])
        own = {"acc", f"length_{doc['length']}"}
        if doc.get("depth") is not None:
            own.add(f"depth_{doc['depth']:g}")
        return {name: value if name in own else NOT_SCORED for name in ("acc", *self.lengths, *self.depths)}

    def _losses(self, doc: dict, results: list[tuple[float, bool]]) -> dict:
        chances = [chance for chance, _ in results]
        whole = (sum(chances), sum(doc["bytes"]))
        tokens = (sum(chances), doc["tokens"])
        scored = {"bits_per_byte": whole, "loss": tokens, f"length_{doc['length']}": whole}
        scored |= {f"from_{edge}": piece for edge, *piece in zip(doc["buckets"], chances, doc["bytes"])}
        return {name: scored.get(name, NOT_SCORED) for name in ("bits_per_byte", "loss", *self.lengths, *self.depths)}

    def aggregation(self) -> dict:
        if self.task.kind == "loss":
            return dict.fromkeys(("bits_per_byte", *self.lengths, *self.depths), bits_per_byte) | {"loss": loss}
        return dict.fromkeys((*self.lengths, *self.depths), mean_of_scored) | {"acc": mean}

    def higher_is_better(self) -> dict:
        metrics = ("bits_per_byte", "loss") if self.task.kind == "loss" else ("acc",)
        return dict.fromkeys((*metrics, *self.lengths, *self.depths), self.task.kind != "loss")
