"""Associative recall: the sequences hold what they promise, and one sDNC layer learns them with temporal links, not without."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from memzoo.data.mqar import associative_recall

SCRIPT = Path(__file__).parents[2] / "scripts" / "associative_recall.py"


@pytest.mark.parametrize(("length", "pairs", "vocab_size"), [(64, 16, 512), (128, 8, 64), (12, 3, 16)])
def test_every_key_is_asked_once_and_its_value_is_the_label(length, pairs, vocab_size):
    ids, labels = associative_recall(32, length, pairs, vocab_size, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (32, length)
    assert ids.min() >= 1 and ids.max() < vocab_size
    for row, wanted in zip(ids, labels):
        keys, values = row[0 : 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert max(keys) < vocab_size // 2 <= min(values)
        places = (wanted != -100).nonzero().squeeze(1).tolist()
        assert len(places) == pairs and min(places) > 2 * pairs
        value_of = dict(zip(keys, values))
        assert sorted(row[p - 1].item() for p in places) == sorted(keys)
        assert all(wanted[p].item() == value_of[row[p - 1].item()] for p in places)


def test_queries_follow_the_power_law():
    """With a = 0.01 most queries come soon after the pairs."""
    _, labels = associative_recall(256, 256, 4, 64, torch.Generator().manual_seed(0))
    places = (labels != -100).nonzero()[:, 1] - 8
    assert (places <= 62).float().mean() > 0.5  # a quarter of the room holds more than half of them


def test_same_seed_same_sequences():
    first, again, other = (associative_recall(4, 32, 4, 64, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("length", "pairs", "message"), [(63, 16, "needs at least 4 \\* pairs = 64"), (400, 40, "pairs is 40, needs 1 to 31")]
)
def test_bad_input_is_one_clear_line(length, pairs, message):
    with pytest.raises(ValueError, match=message):
        associative_recall(2, length, pairs, 64, torch.Generator())


def test_one_layer_learns_it_with_temporal_links_and_not_without(capsys):
    spec = importlib.util.spec_from_file_location("associative_recall_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = Namespace(pairs=16, length=64, vocab_size=512, steps=160, batch=32, learning_rate=4e-3, every=160)
    assert script.learn(True, 0, options)["curve"][-1][1] >= 0.99
    assert script.learn(False, 0, options)["curve"][-1][1] < 0.2
