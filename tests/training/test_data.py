"""Text data: every kind of file, blocks that lose no token, documents kept apart, an order that is a function of the step."""

import json
from itertools import pairwise

import datasets
import pytest
import torch
from conftest import sentences
from transformers import AutoModelForCausalLM, LlamaConfig

from memzoo import preset
from memzoo.data import load_tokenizer
from memzoo.training import BadInput
from memzoo.training.order import BatchSampler, Order
from memzoo.training.text import Blocks, collate_apart, collate_concat, load_documents, tokenize

TEXTS = [sentences(3, 1), sentences(1, 2), "", sentences(9, 3), "  ", sentences(2, 4)]
FULL = [text for text in TEXTS if text.strip()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def files(tmp_path):
    rows = [{"body": text, "number": 1} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "texts", "texts/*.txt"])
def test_every_kind_of_file_gives_the_same_documents(files, name):
    column = "text" if "texts" in name else "body"
    rows = load_documents(str(files / name), column=column)
    assert [text.strip() for text in rows["text"] if text and text.strip()] == FULL


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("none.txt", "text", "there is no such file or folder"),
        ("none/*.txt", "text", "no file matches"),
        ("a.jsonl", "text", "has no column 'text'; its columns: body, number"),
        ("a.jsonl", "number", "column 'number' holds int64, needs strings"),
        (".", "body", "needs files of one kind"),
        ("blank.txt", "text", "empty, there is no text in it"),
        ("spaces.jsonl", "text", "empty, there is no text in it"),
        ("void", "text", "the folder has no .txt"),
        ("torn.jsonl", "text", "torn.jsonl: "),
    ],
)
def test_data_that_cannot_be_trained_on(files, name, column, says):
    (files / "blank.txt").write_text("")
    (files / "spaces.jsonl").write_text('{"text": "  "}\n')
    (files / "torn.jsonl").write_text('{"text": "  \n')
    (files / "void").mkdir()
    with pytest.raises(BadInput) as error:
        load_documents(str(files / name), column=column)
    assert says in str(error.value) and "\n" not in str(error.value)


def blocks_of(tokenizer, length):
    return Blocks(tokenize(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, length), length)


@pytest.mark.parametrize("length", [2, 7, 32, 100])
def test_blocks_are_the_documents_end_to_end(tokenizer, length):
    documents = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in FULL]
    stream = [token for ids in documents for token in ids]
    begins = {sum(map(len, documents[:number])) for number in range(len(documents))}
    blocks = blocks_of(tokenizer, length)
    assert len(blocks) == len(stream) // length
    for index in range(len(blocks)):
        block, start = blocks[index], index * length
        assert block["input_ids"].tolist() == stream[start : start + length]
        assert block["starts"].tolist() == [i for i in range(1, length) if start + i in begins]


def test_documents_kept_apart_do_not_see_each_other(tokenizer):
    blocks = blocks_of(tokenizer, 48)
    batch = collate_apart([blocks[0], blocks[1], blocks[2]])
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) > 5 and bounds[-1] == 3 * 48 and batch["max_length_q"] == max(b - a for a, b in pairwise(bounds))
    llama = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    for config in (preset("linear-transformer-delta-tiny"), preset("sdnc-tiny"), llama):
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            total = model(**batch, num_items_in_batch=1.0, use_cache=False).loss
            parts = [batch["input_ids"][:, a:b] for a, b in pairwise(bounds)]
            alone = sum(model(input_ids=p, labels=p, num_items_in_batch=1.0).loss for p in parts if p.shape[1] > 1)
        torch.testing.assert_close(total, alone)
        assert abs(total - model(**collate_concat([blocks[i] for i in range(3)]), num_items_in_batch=1.0).loss) > 1e-6


def test_an_epoch_has_every_example_once_and_the_next_another_order():
    order = Order(10, seed=3)
    epochs = [[order[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] == [Order(10, seed=3)[i] for i in range(10)]
    assert epochs[0] != [Order(10, seed=4)[i] for i in range(10)]


def test_a_step_has_the_same_examples_however_it_is_divided():
    def steps(start=0, **kwargs):
        parts = [list(BatchSampler(Order(37, 1), start, 12, rank=r, **kwargs)) for r in range(kwargs.get("processes", 1))]
        forwards = kwargs.get("forwards", 1)
        return [
            [i for f in range(forwards) for part in parts for i in part[s * forwards + f]] for s in range(len(parts[0]) // forwards)
        ]

    whole = steps(batch=12)
    assert steps(batch=6, processes=2) == whole == steps(batch=3, processes=2, forwards=2)
    assert steps(start=5, batch=6, processes=2) == whole[5:]
