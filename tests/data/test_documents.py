"""Training documents: exact lengths, ids that are the tokenizer's own, labels on the answers, repeatable and resumable, bad input."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memzoo.data import NeedleDocuments, load_tokenizer, needle_documents, prose
from memzoo.data.documents import IGNORED

TOKENIZER = load_tokenizer()


def text_of(row):
    ids = row["input_ids"]
    return TOKENIZER.decode(ids[: ids.index(TOKENIZER.eos_token_id)])


def answers_of(row):
    """Runs of labels, decoded."""
    runs = itertools.groupby(row["labels"], lambda label: label != IGNORED)
    return [TOKENIZER.decode(list(run)) for trained, run in runs if trained]


@given(
    st.sampled_from(["niah_single_1", "niah_single_2", "niah_single_3"]),
    st.integers(400, 900),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_every_document_keeps_its_promises(task, length, needles, value_digits, key_words, index):
    documents = NeedleDocuments(
        TOKENIZER,
        length,
        seed=3,
        task=task,
        needles=needles,
        queries=(needles + 1) // 2,
        value_digits=value_digits,
        key_words=key_words,
    )
    row = documents[index]
    ids, labels = row["input_ids"], row["labels"]
    assert len(ids) == len(labels) == length
    end = ids.index(TOKENIZER.eos_token_id)
    text = text_of(row)
    assert TOKENIZER(text).input_ids == ids[:end]
    assert set(ids[end + 1 :]) <= {TOKENIZER.pad_token_id} and length - end - 1 <= 34

    hidden = dict(re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?=\s)", text))
    assert len(hidden) == len(set(hidden.values())) == needles
    asked = re.findall(r"The special magic \w+ for (\S+) mentioned in the provided text is (\S+)\.", text)
    assert len({key for key, _ in asked}) == len(asked) == (needles + 1) // 2
    assert all(hidden[key] == value for key, value in asked)
    kind = "uuid" if task == "niah_single_3" else "number"
    key, value = asked[-1]
    final = (
        f"\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
        f"The special magic {kind} for {key} mentioned in the provided text is {value}."
    )
    assert text.endswith(final)
    assert text.startswith(f"A special magic {kind} is hidden within the following text. Make sure to memorize it.")

    assert answers_of(row) == [f" {value}." for _, value in asked[:-1]] + [f" {value}.{TOKENIZER.eos_token}"]
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids))


def test_a_range_of_needles():
    counts = []
    for row in itertools.islice(NeedleDocuments(TOKENIZER, 300, needles=(1, 3), queries=2), 40):
        context, *asked = text_of(row).split("\n")[1:]
        counts.append(context.count("One of the special magic"))
        assert len(asked) == min(counts[-1], 2) and row["labels"].count(IGNORED) > 250
        assert row["input_ids"].count(TOKENIZER.pad_token_id) <= 8
    assert set(counts) == {1, 2, 3}


def test_loss_on_all_tokens():
    row = NeedleDocuments(TOKENIZER, 300, loss="all")[5]
    same = NeedleDocuments(TOKENIZER, 300)[5]
    end = row["input_ids"].index(TOKENIZER.eos_token_id)
    assert row["input_ids"] == same["input_ids"]
    assert row["labels"] == row["input_ids"][: end + 1] + [IGNORED] * (299 - end)


def test_documents_depend_on_seed_and_index_only():
    documents = NeedleDocuments(TOKENIZER, 300, seed=1)
    again = NeedleDocuments(load_tokenizer(), 300, seed=1)
    rows = list(itertools.islice(documents.stream(), 6))
    assert rows[4] == documents[4] == again[4] == next(again.stream(4)) == next(itertools.islice(iter(documents), 4, None))
    assert len({tuple(row["input_ids"]) for row in rows}) == 6
    assert NeedleDocuments(TOKENIZER, 300, seed=2)[4] != rows[4]


def test_dataset():
    dataset = needle_documents(TOKENIZER, 256, 12, seed=4, needles=2, value_digits=3)
    assert dataset.column_names == ["input_ids", "labels"] and len(dataset) == 12
    assert {len(row["input_ids"]) for row in dataset} == {len(row["labels"]) for row in dataset} == {256}
    assert dataset[7] == NeedleDocuments(TOKENIZER, 256, 4, needles=2, value_digits=3)[7]


def test_haystacks_come_from_the_split():
    train, test = (" ".join(prose(split).split()) for split in ("train", "test"))
    for split, inside, outside in (("train", train, test), ("test", test, train)):
        pieces = []
        for index in range(20):
            text = text_of(NeedleDocuments(TOKENIZER, 400, needles=1, split=split)[index])
            context = text.split("\n")[1]
            pieces += [p.strip() for p in re.split(r"One of the special magic numbers for \S+ is: \d+\.", context) if len(p) > 200]
        assert len(pieces) > 10
        # A haystack may run over the end of its split and go on at the beginning.
        assert sum(p in inside for p in pieces) >= len(pieces) - 1 and not any(p in outside for p in pieces)


def test_needles_are_everywhere():
    places = []
    for row in itertools.islice(NeedleDocuments(TOKENIZER, 1024, needles=2), 100):
        context = text_of(row).split("\n")[1]
        places += [m.start() / len(context) for m in re.finditer("One of the special magic", context)]
    counts = [sum(low <= p < low + 0.25 for p in places) for low in (0, 0.25, 0.5, 0.75)]
    assert min(counts) > 25 and sum(counts) == 200


def test_another_kind_of_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = [*sorted(set(prose()) | set("0123456789▁")), "\n"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(prose("train")[:100_000].splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    for row in itertools.islice(NeedleDocuments(tokenizer, 700, needles=2), 10):
        end = row["input_ids"].index(tokenizer.eos_token_id)
        text = tokenizer.decode(row["input_ids"][:end])
        value = re.search(r"text is (\d{7})\.$", text).group(1)
        trained = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert len(row["input_ids"]) == 700 and 700 - end < 60
        assert value in trained and tokenizer(text, add_special_tokens=False).input_ids == row["input_ids"][:end]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 60}, r"length 60 is too short for 4 needles and 4 queries, needs \d+$"),
        ({"queries": 5}, r"queries is 5, needs 1 to the number of needles \(4\)"),
        ({"queries": 0}, "queries is 0"),
        ({"needles": 0}, "needles is 0, needs a number from 1 on, or a pair"),
        ({"needles": (3, 2)}, r"needles is \(3, 2\)"),
        ({"loss": "some"}, "loss is 'some', needs 'answers' or 'all'"),
        ({"task": "niah"}, "unknown needle task 'niah'"),
        (
            {"task": "niah_multikey_2"},
            "niah_multikey_2 has no training documents, needs niah_single_1, niah_single_2 or niah_single_3",
        ),
        ({"value_digits": 20}, "value_digits is 20"),
        ({"split": "dev"}, "split is 'dev'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message) as error:
        NeedleDocuments(TOKENIZER, **{"length": 300, **change})
    assert "\n" not in str(error.value)
    if "length" in change:
        shortest = int(str(error.value).split()[-1])
        assert len(NeedleDocuments(TOKENIZER, shortest)[9]["input_ids"]) == shortest


def test_bad_counts():
    with pytest.raises(ValueError, match="count is 0"):
        needle_documents(TOKENIZER, 300, 0)
    with pytest.raises(IndexError, match="document -1"):
        NeedleDocuments(TOKENIZER, 300)[-1]
