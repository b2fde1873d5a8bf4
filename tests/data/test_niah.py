"""Needle samples: RULER's wording (against lm-eval's own), lengths, depths, uniqueness, repeatability, bad input."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memzoo.data import load_tokenizer, make_sample, needle_samples, prose
from memzoo.data.haystack import NOISE, Haystack
from memzoo.data.niah import FORMATS, Needle, answer_tokens, draw_needles, prompt, prompt_several, score

TASKS = tuple(FORMATS)
SINGLE = TASKS[:3]  # one needle, in noise or in prose
SEVERAL = ("niah_multivalue", "niah_multiquery")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def foreign_tokenizer():
    """A tokenizer of another kind: spaces become a mark before the word, a beginning-of-text token is added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*prose("train")[:200_000].splitlines(), "0 1 2 3 4 5 6 7 8 9 -\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def rng(seed=0):
    return np.random.default_rng(seed)


def context_of(sample):
    return sample["input"].split("\n", 1)[1].rsplit("\n", 1)[0]


@pytest.fixture(scope="module")
def ruler():
    """lm-eval's own generator, kept off the network."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    patch = pytest.MonkeyPatch()
    patch.setattr(nltk, "download", lambda *args, **kwargs: True)
    module = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    patch.undo()
    return module


def test_niah_single_1_equals_lm_evals_own(ruler, tokenizer):
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    random.seed(3)
    theirs = ruler.generate_samples(
        ruler.get_haystack("repeat"), tokenizer, max_seq_length=512, template=TEMPLATE, type_haystack="repeat",
        type_needle_k="words", type_needle_v="numbers", num_samples=5,
    )  # fmt: skip
    for sample in theirs:
        lines = sample["input"].split("\n")[1:-1]
        where = next(i for i, line in enumerate(lines) if line != NOISE)
        key, value = re.fullmatch(r"One of the special magic numbers for (.*) is: (\d{7})\.", lines[where]).groups()
        needle = Needle(key, value, "numbers")
        assert [value] == sample["outputs"]
        context = Haystack.of("repeat", "test", tokenizer).text(0, len(lines) - 1, [(where, needle.sentence)])
        assert prompt(needle, context) == sample["input"]
        assert needle.prefix == sample["gen_prefix"]


@pytest.mark.parametrize("values", ["numbers", "uuids"])
def test_essay_tasks_equal_lm_evals_own(ruler, tokenizer, monkeypatch, values):
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    monkeypatch.setattr(ruler, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?]) ", text))
    random.seed(4)
    words = prose("test").split()
    theirs = ruler.generate_samples(
        words, tokenizer, max_seq_length=1024, template=TEMPLATE, type_haystack="essay", type_needle_k="words",
        type_needle_v=values, num_samples=5,
    )  # fmt: skip
    for sample in theirs:
        key, value = re.search(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample["input"]).groups()
        needle = Needle(key, value, values)
        before = context_of(sample).split(needle.sentence)[0].split()
        count = len(context_of(sample).split()) - len(needle.sentence.split())
        context = Haystack.of("essay", "test", tokenizer).text(0, count, [(len(before), needle.sentence)])
        assert prompt(needle, context) == sample["input"]
        assert needle.prefix == sample["gen_prefix"]


def theirs_of(ruler, tokenizer, kind, haystack, **settings):
    """Samples of lm-eval's generator for a task, which draws from the global random state."""
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    random.seed(5)
    return ruler.generate_samples(
        haystack, tokenizer, max_seq_length=1024, template=TEMPLATE, type_haystack=kind, num_samples=4, **settings
    )


@pytest.mark.parametrize(
    ("task", "kind"), [("niah_multikey_2", "words"), ("niah_multikey_3", "uuids")], ids=["multikey_2", "multikey_3"]
)
def test_haystacks_of_needles_equal_lm_evals_own(ruler, tokenizer, task, kind):
    values = FORMATS[task].values
    for sample in theirs_of(ruler, tokenizer, "needle", ruler.get_haystack("needle"), type_needle_k=kind, type_needle_v=values):
        key = re.search(r"for (\S+) mentioned in the provided text is$", sample["gen_prefix"]).group(1)
        needle = Needle(key, sample["outputs"][0], values)
        lines = sample["input"].split("\n")[1:-1]
        assert needle.sentence in lines and all(
            re.fullmatch(rf"One of the special magic {values} for \S+ is: \S+\.", x) for x in lines
        )
        assert prompt(needle, "\n".join(lines)) == sample["input"] and needle.prefix == sample["gen_prefix"]


@pytest.mark.parametrize(
    ("task", "settings"),
    [("niah_multikey_1", {"num_needle_k": 4}), ("niah_multivalue", {"num_needle_v": 4}), ("niah_multiquery", {"num_needle_q": 4})],
)
def test_several_needles_equal_lm_evals_own(ruler, tokenizer, monkeypatch, task, settings):
    monkeypatch.setattr(ruler, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?]) ", text))
    words = prose("test").split()
    samples = theirs_of(ruler, tokenizer, "essay", words, type_needle_k="words", type_needle_v="numbers", **settings)
    for sample in samples:
        found = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", sample["input"])
        needles = [Needle(key, value, "numbers") for key, value in found]
        assert len(needles) == 4
        context, places = context_of(sample), []
        for needle in needles:
            before, after = context.split(needle.sentence)
            places.append((len(before.split()), needle.sentence))
            context = f"{before.rstrip()} {after.lstrip()}".strip()
        rebuilt = Haystack.of("essay", "test", tokenizer).text(0, len(context.split()), places)
        asked = [next(key for key, value in found if value == answer) for answer in sample["outputs"]]
        if task == "niah_multikey_1":
            needle = Needle(asked[0], sample["outputs"][0], "numbers")
            ours = prompt(needle, rebuilt), needle.prefix
        else:
            ours = prompt_several("numbers", list(dict.fromkeys(asked)), rebuilt)
        # Where needles meet, or one comes first or last, theirs has an empty piece of text and one more space.
        theirs = re.sub(" ?\n ?", "\n", re.sub(" {2,}", " ", sample["input"]))
        assert ours == (theirs, sample["gen_prefix"])


@given(st.sampled_from(TASKS[3:]), st.integers(560, 3000), st.floats(0, 1), st.integers(0, 10**6))
def test_samples_of_several_needles_keep_their_promises(task, length, depth, seed):
    tokenizer, form = load_tokenizer_once(), FORMATS[task]
    sample = make_sample(task, tokenizer, length, depth, rng(seed))
    full = f"{sample['input']} {sample['gen_prefix']}"
    assert sample["tokens"] == len(tokenizer(full).input_ids)
    assert length - 1 <= sample["tokens"] + form.answer_tokens <= length
    assert answer_tokens(sample, tokenizer) <= form.answer_tokens
    found = re.findall(rf"One of the special magic {form.values} for (\S+) is: (\S+)\.", context_of(sample))
    assert len({value for _, value in found}) == len(found)  # values are distinct
    assert len(sample["outputs"]) == form.answers and all(full.count(value) == 1 for value in sample["outputs"])
    asked = sample["key"].split(", ")
    assert [key for value in sample["outputs"] for key, held in found if held == value] == asked * form.values_per_key
    if form.haystack == "essay":
        assert len(found) == 4
    else:
        assert sum(key == asked[0] for key, _ in found) == 1
        place = [value for _, value in found].index(sample["value"])
        assert sample["depth"] == depth and abs(place - depth * (len(found) - 1)) <= 0.5
    assert (sample["depth"] is None) == (task in SEVERAL)


def test_the_needle_that_is_asked_for_is_at_the_depth(tokenizer):
    for depth in (0.0, 0.3, 1.0):
        for seed in range(5):
            sample = make_sample("niah_multikey_1", tokenizer, 2048, depth, rng(seed))
            before, after = context_of(sample).split(Needle(sample["key"], sample["value"], "numbers").sentence)
            assert abs(len(before) / (len(before) + len(after)) - depth) < 0.08


def test_several_answers_have_no_depth(tokenizer):
    samples = list(needle_samples("niah_multiquery", tokenizer, [600], [0.0, 0.5, 1.0], samples=2))
    assert len(samples) == 6 and {sample["depth"] for sample in samples} == {None}
    assert len({sample["input"] for sample in samples}) == 6


@given(st.sampled_from(SINGLE), st.integers(160, 3000), st.floats(0, 1), st.integers(0, 10**6))
def test_every_sample_keeps_its_promises(task, length, depth, seed):
    tokenizer = load_tokenizer_once()
    sample = make_sample(task, tokenizer, length, depth, rng(seed))
    reserve = FORMATS[task].answer_tokens
    full = f"{sample['input']} {sample['gen_prefix']}"
    assert sample["tokens"] == len(tokenizer(full).input_ids)
    assert length - 1 <= sample["tokens"] + reserve <= length
    assert answer_tokens(sample, tokenizer) <= reserve
    value, key = sample["value"], sample["key"]
    assert sample["outputs"] == [value] and sample["length"] == length and sample["depth"] == depth
    assert full.count(value) == 1 and full.count(key) == 3
    context = context_of(sample)
    sentence = next(s for s in [Needle(key, value, FORMATS[task].values).sentence] if s in context)
    separator = "\n" if task == "niah_single_1" else " "
    before, after = (part.split(separator) if part.strip() else [] for part in context.split(sentence))
    before, after = [w for w in before if w], [w for w in after if w]
    if task == "niah_single_1":  # the last line may be cut short
        *lines, last = before + after
        assert set(lines) <= {NOISE} and NOISE.startswith(last)
        before, after = ([line for line in lines if line == NOISE] for lines in (before, after))
    units = len(before) + len(after)
    # Within half a sentence of prose (the longest has some 200 words), or half a line of noise.
    assert abs(len(before) - depth * units) <= (0.5 if task == "niah_single_1" else 110)
    if depth in (0.0, 1.0):
        assert not (before if depth == 0.0 else after)


_ONCE = []


def load_tokenizer_once():
    if not _ONCE:
        _ONCE.append(load_tokenizer())
    return _ONCE[0]


def test_depth_is_close_on_average(tokenizer):
    off = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        for sample in needle_samples("niah_single_2", tokenizer, [1024], [depth], samples=20):
            before, after = context_of(sample).split(Needle(sample["key"], sample["value"], "numbers").sentence)
            off.append(abs(len(before) / (len(before) + len(after)) - depth))
    assert np.mean(off) < 0.02 and max(off) < 0.12


def test_needles_stand_between_sentences(tokenizer):
    before = [
        context_of(sample).split(" One of the special magic")[0]
        for sample in needle_samples("niah_single_2", tokenizer, [600], [0.3, 0.7], samples=20)
    ]
    assert sum(bool(re.search(r"[.!?][\"')]*$", text)) for text in before) > 36  # the others end a paragraph
    assert not any(text.endswith(("Mr.", "Mrs.", "Dr.")) for text in before)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_another_kind_of_tokenizer(task, depth, foreign_tokenizer):
    for length in (500, 1500):
        sample = make_sample(task, foreign_tokenizer, length, depth, rng(1))
        tokens = len(foreign_tokenizer(f"{sample['input']} {sample['gen_prefix']}").input_ids)
        assert tokens == sample["tokens"]
        assert length - 1 <= tokens + FORMATS[task].answer_tokens <= length


def test_longer_than_the_text(tokenizer):
    sample = make_sample("niah_single_2", tokenizer, 80_000, 0.9, rng())
    assert 79_999 <= sample["tokens"] + 16 <= 80_000
    assert len(tokenizer(prose("test")).input_ids) < 80_000


def test_cells_do_not_depend_on_the_grid(tokenizer):
    alone = list(needle_samples("niah_single_2", tokenizer, [512], [0.5], samples=2, seed=7))
    grid = list(needle_samples("niah_single_2", tokenizer, [256, 512], [0.0, 0.5, 1.0], samples=3, seed=7))
    assert [s for s in grid if s["length"] == 512 and s["depth"] == 0.5][:2] == alone
    assert alone != list(needle_samples("niah_single_2", tokenizer, [512], [0.5], samples=2, seed=8))
    assert alone[0]["input"] != alone[1]["input"]


def test_difficulty_is_never_the_default(tokenizer):
    plain = make_sample("niah_single_2", tokenizer, 300, 0.5, rng())
    assert re.fullmatch(r"[a-z]+-[a-z]+", plain["key"]) and re.fullmatch(r"[1-9]\d{6}", plain["value"])
    easy = make_sample("niah_single_2", tokenizer, 300, 0.5, rng(), value_digits=2, key_words=1)
    assert re.fullmatch(r"[a-z]+", easy["key"]) and re.fullmatch(r"[1-9]\d", easy["value"])
    assert answer_tokens(plain, tokenizer) == 4 and answer_tokens(easy, tokenizer) == 1


def test_keys_and_values_differ():
    needles = draw_needles("niah_single_2", rng(), 40, value_digits=2, avoid="all but 12 and 34")
    assert len({n.key for n in needles}) == len({n.value for n in needles}) == 40
    assert not {"12", "34"} & {n.value for n in needles}


def test_uuids_are_version_4(tokenizer):
    import uuid

    assert uuid.UUID(make_sample("niah_single_3", tokenizer, 400, 0.5, rng())["value"]).version == 4


def test_score_is_rulers():
    sample = {"outputs": ["1234567"]}
    assert score(sample, " 1234567. And") == score(sample, "it is 1234567") == 1.0
    assert score(sample, " 1234568") == score(sample, "") == 0.0
    assert score({"outputs": ["ab12"]}, "AB12") == 1.0
    assert score({"outputs": ["12", "34", "56", "78"]}, "12, 78 and 35") == 0.5


@pytest.mark.parametrize("task", TASKS)
def test_too_short_states_the_minimum(task, tokenizer):
    with pytest.raises(ValueError, match=r"length 40 is too short for the template, needs at least \d+$") as error:
        make_sample(task, tokenizer, 40, 0.5, rng())
    shortest = int(str(error.value).split()[-1])
    assert make_sample(task, tokenizer, shortest, 0.5, rng())["tokens"] + FORMATS[task].answer_tokens == shortest
    with pytest.raises(ValueError, match="too short"):
        make_sample(task, tokenizer, shortest - 1, 0.5, rng())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "niah_single_4"}, "unknown needle task 'niah_single_4', needs one of niah_single_1"),
        ({"depth": 1.5}, "depth is 1.5, needs 0 to 1"),
        ({"depth": float("nan")}, "depth is nan"),
        ({"value_digits": 0}, "value_digits is 0, needs 1 to 14"),
        ({"value_digits": 15}, "value_digits is 15"),
        ({"key_words": 3}, "key_words is 3, needs 1 or 2"),
        ({"split": "dev"}, "split is 'dev'"),
    ],
)
def test_bad_arguments(change, message, tokenizer):
    arguments = {"task": "niah_single_2", "tokenizer": tokenizer, "length": 300, "depth": 0.5, "rng": rng(), **change}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_sample(**arguments)
    assert "\n" not in str(error.value)


def test_too_many_needles():
    with pytest.raises(ValueError, match="68 needles do not fit value_digits=7 and key_words=1: 1 to 67 do"):
        draw_needles("niah_single_2", rng(), 68, key_words=1)


def test_no_samples(tokenizer):
    for change in ({"samples": 0}, {"lengths": []}, {"depths": []}):
        with pytest.raises(ValueError, match="no samples to make"):
            list(needle_samples("niah_single_2", tokenizer, **change))


def test_slow_tokenizer_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="fast tokenizer, ByT5Tokenizer is not one"):
        make_sample("niah_single_2", ByT5Tokenizer(), 600, 0.5, rng())
