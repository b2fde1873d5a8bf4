"""lm-eval side of memzoo's needle tasks: documents from the metadata, scores by length and by depth."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from memzoo.data.niah import FORMATS, needle_samples, score
from memzoo.data.text import load_tokenizer

SETTINGS = ("depths", "samples", "seed", "value_digits", "key_words")
NOT_SCORED = -1.0


def build(task: str, **metadata) -> dict[str, Dataset]:
    """The test documents of a task. Metadata: max_seq_lengths, depths, samples (a cell), seed, value_digits, key_words, tokenizer."""
    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained") or metadata.get("model")
    if not isinstance(tokenizer, str):
        raise ValueError(f'memzoo_{task} sizes its documents by tokens: pass --metadata \'{{"tokenizer": "..."}}\'')
    settings = {key: metadata[key] for key in SETTINGS if key in metadata}
    lengths = metadata.get("max_seq_lengths", (512, 1024, 2048, 4096))
    tokenizer = load_tokenizer(tokenizer, trust_remote_code=str(metadata.get("trust_remote_code")).lower() == "true")
    return {"test": Dataset.from_list(list(needle_samples(task, tokenizer, lengths, **settings)))}


niah_single_1, niah_single_2, niah_single_3 = (partial(build, task) for task in FORMATS)


def mean_of_scored(values: list[float]) -> float:
    """The mean over the documents that belong to this length or depth; the others are marked -1 and left out."""
    scored = [value for value in values if value != NOT_SCORED]
    return sum(scored) / len(scored) if scored else NOT_SCORED


class NeedleTask(ConfigurableTask):
    """A needle task that reports `acc`, and `length_<tokens>` and `depth_<share>` for the lengths and depths its documents have."""

    def __init__(self, config: dict) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        documents = self.dataset["test"]
        self.lengths = [f"length_{length}" for length in sorted(set(documents["length"]))]
        self.depths = [f"depth_{depth:g}" for depth in sorted(set(documents["depth"]))]

    def process_results(self, doc: dict, results: list[str]) -> dict[str, float]:
        value = score(doc, results[0])
        own = {"acc", f"length_{doc['length']}", f"depth_{doc['depth']:g}"}
        return {name: value if name in own else NOT_SCORED for name in ("acc", *self.lengths, *self.depths)}

    def aggregation(self) -> dict:
        return dict.fromkeys((*self.lengths, *self.depths), mean_of_scored) | {"acc": mean}

    def higher_is_better(self) -> dict:
        return dict.fromkeys(("acc", *self.lengths, *self.depths), True)
