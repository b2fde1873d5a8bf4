"""What the tests of training share: a small text, a tiny model, and scripts/train.py called in this process."""

import importlib.util
import json
import random
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"

spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

WORDS = "the a cat dog sees saw near far house tree little old and with in on river stone bright slow sings".split()  # noqa: SIM905
TINY = ["--model", "linear-transformer-tiny", "--set", "hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2"]
TINY += ["intermediate_size=32", "conv_width=4"]
SHORT = ["--length", "32", "--batch_size", "4", "--steps", "6", "--warmup", "2", "--log_every", "2", "--eval_every", "0"]
SHORT += ["--save_every", "0", "--tracker", "none", "--eval_fraction", "0.1"]


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(count))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Datasets are cached in a folder of the test session, and no state of Accelerate outlives a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(sentences(400))
    return str(path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The folder of a config with dropout, so that random states matter."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes, attention_dropout=0.3, tie_word_embeddings=True, pad_token_id=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(capsys):
    """`train(*flags)` runs scripts/train.py here; returns (exit code, stdout, stderr)."""
    from memzoo.training.errors import run_or_refuse

    def call(*flags) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        code = run_or_refuse(lambda: script.main([str(flag) for flag in flags]))
        return code, *capsys.readouterr()

    return call


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder) -> list[tuple[int, str]]:
    """Every loss in the log as it is printed."""
    return [(row["step"], f"{row[name]:.9f}") for row in log(folder) for name in ("loss", "eval_loss") if name in row]
