"""Models that the tests of scoring share: tiny ones with random weights, a perfect reader and a guesser."""

import math
import re

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.model import LM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import memzoo
from memzoo.data import load_tokenizer
from memzoo.data.symbols import single_token_words
from memzoo.models.presets import FAMILIES

TOKENIZER = load_tokenizer()
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


# A Llama, and one family of every architecture there is: "linear-transformer", "sdnc", ...
KINDS = ["llama", *{model_type: family for family, (model_type, *_) in reversed(FAMILIES.items())}.values()]


def tiny(kind):
    """A tiny model of an architecture with random weights, in float32."""
    torch.manual_seed(1)
    if kind == "llama":
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        config = LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=8192, **SPECIAL, **sizes, training_length=256)
        model = LlamaForCausalLM(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = AutoModelForCausalLM.from_config(memzoo.preset(f"{kind}-tiny", vocab_size=len(TOKENIZER), **SPECIAL, **sizes))
    for parameter in model.parameters():
        parameter.data *= 3  # answers that depend on the prompt, and no near ties
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved models by kind, with memzoo's tokenizer."""
    made = {}
    for kind in ("llama", "linear-transformer", "sdnc"):
        made[kind] = tmp_path_factory.mktemp("models") / kind
        tiny(kind).save_pretrained(made[kind])
        TOKENIZER.save_pretrained(made[kind])
    return made


class Reader(LM):
    """Answers every question by reading its prompt; stories excepted, where it looks the answer up."""

    def generate_until(self, requests, disable_tqdm=False):
        return [f" {self.answer(request.args[0], request.doc)}" for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        if "queries" not in requests[0].doc:
            return [(0.0, True)] * len(requests)  # every token was certain
        return [(0.0, self.recall(request.args[0].split()) == request.args[1].strip()) for request in requests]

    def recall(self, words):
        return words[words.index(words[-1]) + 1]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def answer(self, prompt, doc):
        if "special magic" in prompt:
            keys = re.search(r"(.+) mentioned in the provided text (is|are)$", prompt.rsplit(" for ", 1)[1]).group(1)
            return " and ".join(
                value for key in re.split(", and |, ", keys) for value in re.findall(rf"for {key} is: (\S+)\.", prompt)
            )
        if "variable assignment" in prompt:
            task = prompt.split("Memorize and track")[-1]
            found, names = re.search(r"assigned the value (\d+) in", task).group(1), []
            for name, old in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", task):
                if old == found or old in names:
                    names.append(name)
            return ", ".join(names)
        if "numbered list" in prompt:
            words = re.findall(r"\d+\. ([a-z]+)", prompt)
            return ", ".join(sorted(set(words), key=words.count, reverse=True)[:10])
        if "coded text" in prompt:
            words = re.search(r"coded words\. (.*)\nQuestion", prompt).group(1).split()
            return ", ".join(sorted(set(words), key=words.count, reverse=True)[1:4])
        if "labels" in doc:
            return doc["outputs"][0]
        *words, _ = prompt.split()
        blank = max(set(words), key=words.count)
        return " ".join(word for word in words if word != blank)


class Guesser(Reader):
    """Knows the form of an answer and nothing else."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def answer(self, prompt, doc):
        if "labels" in doc:
            return self.rng.choice(doc["labels"])
        if "chance" in doc:
            alphabet = round(1 / doc["chance"])
            names = single_token_words(TOKENIZER)[2 : 2 + alphabet]
            return " ".join(self.rng.choice(names) for _ in doc["outputs"])
        return " ".join(str(number) for number in self.rng.integers(10**6, 10**7, size=4))

    def loglikelihood(self, requests, disable_tqdm=False):
        if "queries" in requests[0].doc:
            return [(-1.0, bool(self.rng.random() < request.doc["chance"])) for request in requests]
        return [(-math.log(len(TOKENIZER)) * len(TOKENIZER(request.args[1]).input_ids), False) for request in requests]
