"""Generators of the other suites: lm-eval's wording and scores, lengths, what a sample promises, repeatability, bad input."""

import random
import re

import numpy as np
import pytest

from memzoo.data import fit, load_tokenizer, prose
from memzoo.data.babi import GIVES, PEOPLE, ROOMS, THINGS, make_story, score_label
from memzoo.data.babi import TASKS as STORIES
from memzoo.data.fit import DoesNotFit, cut
from memzoo.data.haystack import NOISE
from memzoo.data.held_out import bucket_edges, make_held_out
from memzoo.data.mqar import make_mqar
from memzoo.data.ruler import cwe_prompt, fwe_prompt, list_words, make_cwe, make_fwe, make_vt, vt_context, vt_example, vt_prompt
from memzoo.data.symbols import make_copy, make_denoise, make_selective_copy, make_transfer, single_token_words
from memzoo.data.tasks import SUITES, TASKS, documents, find_tasks, score_words

TOKENIZER = load_tokenizer()
SYMBOLS = ("copy", "denoise", "selective_copy", "transfer")


def rng(seed=0):
    return np.random.default_rng(seed)


# Every task


@pytest.fixture(scope="module")
def foreign_tokenizer():
    """A tokenizer of another kind: spaces become a mark before the word, a beginning-of-text token is added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*prose("train")[:100_000].splitlines(), "0 1 2 3 4 5 6 7 8 9 -\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A tokenizer without words: every byte is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check_lengths(name, tokenizer, lengths):
    """Documents of every length have that many tokens, counted on the whole text, or one less."""
    task = TASKS[name]
    for length in lengths:
        for sample in documents(name, tokenizer, length, 2, seed=length, depths=[0.0, 1.0]):
            text = f"{sample['input']}{task.delimiter}{sample['gen_prefix']}" if sample["gen_prefix"] else sample["input"]
            tokens = len(tokenizer(text, add_special_tokens=task.kind != "loss").input_ids)
            assert sample["tokens"] == tokens and sample["length"] == length
            answer = task.most_tokens(sample) if task.kind == "generate" else 0
            assert tokens + answer in (length - 1, length), (length, sample["input"][-300:])


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_as_asked(name):
    check_lengths(name, TOKENIZER, (768, 1013, 1999, 3000, 6000))


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_as_asked_with_another_kind_of_tokenizer(name, foreign_tokenizer):
    check_lengths(name, foreign_tokenizer, (1400, 1999, 2503))


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_multikey_1", "niah_multikey_3", "vt", "fwe", "babi_long_qa2", "ppl_by_length"]
)
def test_lengths_are_as_asked_with_bytes(name, byte_tokenizer):
    check_lengths(name, byte_tokenizer, (5003, 5048))


def test_where_no_cut_fits_words_do(byte_tokenizer):
    """A character of four tokens cannot fill two or three."""
    for room in (2, 3, 7):
        piece = cut(byte_tokenizer, "\N{OWL}" * 9, room, lambda piece, room=room: room - len(piece.encode()))
        assert len(byte_tokenizer(piece).input_ids) in (room - 1, room)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].kind == "generate" and name not in SYMBOLS])
def test_the_last_piece_is_all_that_a_length_adds(name, foreign_tokenizer, monkeypatch):
    """Without it a document is the same, and it holds no answer."""
    pieces = 0
    as_asked = list(documents(name, foreign_tokenizer, 1500, 30))
    monkeypatch.setattr(fit, "cut", lambda *_: "")
    for whole, short in zip(as_asked, documents(name, foreign_tokenizer, 1500, 30)):
        text, without = whole.pop("input"), short.pop("input")
        size = len(text) - len(without)
        first = next((i for i, (a, b) in enumerate(zip(text, without)) if a != b), len(without))
        piece = text[first : first + size]
        assert text[:first] + text[first + size :] == without
        assert not any(output in piece for output in whole["outputs"])
        assert bool(piece) == (whole.pop("tokens") > short.pop("tokens")) and whole == short
        pieces += bool(piece)
    assert pieces > 0


def test_a_tokenizer_without_words_is_refused(byte_tokenizer):
    for name in ("mqar", "copy"):
        with pytest.raises(DoesNotFit, match=rf"{name} needs \d+ words that are one token each, this tokenizer has 0"):
            next(documents(name, byte_tokenizer, 200, 1))


@pytest.mark.parametrize("name", TASKS)
def test_documents_depend_on_seed_length_and_number_only(name):
    few, many = (list(documents(name, TOKENIZER, 768, count, seed=3, depths=[0.5])) for count in (2, 4))
    assert many[:2] == few and few[0]["input"] != few[1]["input"]
    assert few != list(documents(name, TOKENIZER, 768, 2, seed=4, depths=[0.5]))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "ppl_by_length"])
def test_too_short_states_the_minimum(name):
    if name == "mqar":
        with pytest.raises(DoesNotFit, match="length 20 is too short for 8 pairs, needs at least 32"):
            make_mqar(TOKENIZER, 20, rng(), pairs=8)
        return
    with pytest.raises(DoesNotFit, match=r"length 16 is too short .* needs at least \d+$") as error:
        next(documents(name, TOKENIZER, 16, 1))
    assert "\n" not in str(error.value)
    shortest = int(str(error.value).split()[-1])
    sample = next(documents(name, TOKENIZER, shortest + 90, 1))  # the words drawn for another length cost more or less
    assert sample["tokens"] <= shortest + 90


@pytest.mark.parametrize("name", TASKS)
def test_difficulty_is_known_and_never_the_default(name):
    published = {
        "value_digits": 7, "key_words": 2, "hops": 4, "chains": 1, "example": True, "common_words": 10, "repeats": None,
        "rare_repeats": None, "alpha": 2.0, "word_letters": 6, "pairs": None, "words": None, "power": 0.01, "facts": None,
        "first_bucket": 128, "symbols": 16 if name == "selective_copy" else 10, "alphabet": 16 if name == "selective_copy" else 8,
    }  # fmt: skip
    assert TASKS[name].difficulty.items() <= published.items()
    with pytest.raises(ValueError, match=rf"{name} has no setting 'easy'"):
        list(documents(name, TOKENIZER, 768, 1, easy=True))


def test_suites_hold_every_task():
    assert sorted(task for tasks in SUITES.values() for task in tasks) == sorted(TASKS)
    assert len(SUITES["niah"]) == 8 and len(SUITES["babi_long"]) == 5
    assert [task.name for task in find_tasks("niah_single_2")] == ["niah_single_2"]
    with pytest.raises(ValueError, match="unknown suite or task 'mmlu', needs one of niah, vt"):
        find_tasks("mmlu")
    with pytest.raises(ValueError, match="no documents to make"):
        list(documents("copy", TOKENIZER, 100, 0))


# RULER's other tasks


@pytest.fixture(scope="module")
def ruler():
    """lm-eval's own generators, kept off the network."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    patch = pytest.MonkeyPatch()
    patch.setattr(nltk, "download", lambda *args, **kwargs: True)
    import lm_eval.tasks.ruler.cwe_utils as cwe
    import lm_eval.tasks.ruler.fwe_utils as fwe
    import lm_eval.tasks.ruler.vt_utils as vt

    patch.undo()
    return {"cwe": cwe, "fwe": fwe, "vt": vt}


def test_cwe_equals_lm_evals_own(ruler):
    random.seed(1)
    for sample in ruler["cwe"].sys_word_pair_random(3, 1024, TOKENIZER):
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", sample["input"].split("\n", 1)[1])
        assert cwe_prompt(words) == (sample["input"], sample["gen_prefix"])
        counts = {word: words.count(word) for word in sample["outputs"]}
        assert set(counts.values()) == {6} and len(counts) == 10


def test_fwe_equals_lm_evals_own(ruler):
    random.seed(2)
    for sample in ruler["fwe"].sys_kwext(TOKENIZER, 1024, num_samples=3):
        words = re.search(r"coded words\. (.*)\nQuestion", sample["input"]).group(1).split()
        assert fwe_prompt(words) == (sample["input"], sample["gen_prefix"])
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert ranked[0] == "..." and set(sample["outputs"]) == set(ranked[1:4])


@pytest.mark.parametrize("noises", [1, 2, 30])
def test_vt_equals_lm_evals_own(ruler, monkeypatch, noises):
    """Their text from their draws: the places are what they sampled, the names what they chose."""
    vt, drawn = ruler["vt"], []
    sample = random.sample
    monkeypatch.setattr(vt.random, "sample", lambda *args: drawn.append(sample(*args)) or drawn[-1])
    random.seed(noises)
    np.random.seed(noises)
    for is_icl in (False, True):
        drawn.clear()
        text, variables = vt.generate_input_output(noises, 1, 4, is_icl=is_icl)
        value = re.search(r"VAR \w+ = (\d+)", text).group(1)
        chain = [f"VAR {variables[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(variables, variables[1:]))]
        context = vt_context(noises, [chain], drawn)
        if is_icl:
            assert vt_example(context, value, variables) == f"{text} {' '.join(variables)}\n\n"
        else:
            ours, prefix = vt_prompt(context, value, 5)
            assert f"{ours} {prefix} " == text


def test_vt_samples():
    for seed in range(4):
        sample = make_vt(TOKENIZER, 1500, rng(seed))
        example, task = sample["input"].split("\n\n\n\n")
        chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", task)
        value = re.search(r"assigned the value (\d+) in the text above", task).group(1)
        assert [name for name, _ in chain] == sample["outputs"] and chain[0][1] == value
        assert [old for _, old in chain[1:]] == sample["outputs"][:-1] and len(set(sample["outputs"])) == 5
        assert task.count(NOISE.split(".")[0]) > 10 and f"5 variables are assgined the value {value}" in sample["gen_prefix"]
        assert not set(sample["outputs"]) & set(re.findall(r"VAR (\w+)", example))  # the answer is not given away
    assert "\n\n\n\n" not in make_vt(TOKENIZER, 1500, rng(), example=False)["input"]
    assert len(make_vt(TOKENIZER, 1500, rng(), hops=1)["outputs"]) == 2
    chains = make_vt(TOKENIZER, 1500, rng(), chains=3, example=False)
    assert len(set(re.findall(r"VAR (\w+) =", chains["input"]))) == 15


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (5000, 30, 3)])
def test_cwe_samples(length, often, seldom):
    sample = make_cwe(TOKENIZER, length, rng())
    words = re.findall(r"\d+\. ([a-z]+)", sample["input"].split("\n")[1])
    counts = {word: words.count(word) for word in set(words)}
    assert {word for word, count in counts.items() if count == often} == set(sample["outputs"])
    assert {count for word, count in counts.items() if word not in sample["outputs"]} == {seldom}
    easy = make_cwe(TOKENIZER, 400, rng(), common_words=2, repeats=8)
    assert len(easy["outputs"]) == 2 and "the 2 most common words" in easy["input"]


def test_a_list_may_be_longer_than_there_are_words(monkeypatch):
    monkeypatch.setattr("memzoo.data.ruler.list_words", lambda: list_words()[:100])
    sample = make_cwe(TOKENIZER, 3000, rng())
    words = re.findall(r"\d+\. ([a-z-]+)", sample["input"])
    counts = sorted(words.count(word) for word in set(words))
    assert counts[:-10] == [1] * (len(words) - 60) and counts[-10:] == [6] * 10 and len(words) > 200


def test_fwe_samples():
    for seed in range(4):
        sample = make_fwe(TOKENIZER, 2000, rng(seed))
        words = re.search(r"coded words\. (.*)\nQuestion", sample["input"]).group(1).split()
        ranked = sorted(set(words), key=words.count, reverse=True)
        counts = [words.count(word) for word in ranked[:5]]
        assert ranked[1:4] == sample["outputs"] and counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("answer", ["alpha, beta", "BETA", "nothing", "\x07alpha\n", "gamma beta alpha"])
def test_scores_equal_lm_evals_own(ruler, answer):
    from lm_eval.tasks.ruler.common_utils import process_results

    document = {"outputs": ["alpha", "beta", "gamma"], "max_length": 512}
    for name in ("niah_multivalue", "vt", "cwe", "fwe"):
        assert TASKS[name].score(document, answer) == process_results(document, [answer])["512"]


# Symbols


def test_words_are_one_token_each():
    words = single_token_words(TOKENIZER)
    assert len(words) > 1000 and len(set(words)) == len(words)
    for word in words[:200]:
        assert len(TOKENIZER(f" {word}", add_special_tokens=False).input_ids) == 1
    with pytest.raises(ValueError, match="mqar needs 9999 words that are one token each, this tokenizer has"):
        make_mqar(TOKENIZER, 100, rng(), words=9999)


@pytest.mark.parametrize("make", [make_copy, make_transfer, make_denoise, make_selective_copy])
def test_symbols_and_blanks(make):
    for seed in range(5):
        sample = make(TOKENIZER, 200, rng(seed))
        *words, marker = sample["input"].split()
        blank = max(set(words), key=words.count)
        shown = [word for word in words if word != blank]
        assert shown == sample["outputs"] and marker not in words and len(words) == 200 - len(shown) - 1
        if make in (make_copy, make_transfer):
            assert words[: len(shown)] == shown and set(words[len(shown) :]) == {blank}
    count, alphabet = (16, 16) if make is make_selective_copy else (10, 8)
    many = [word for seed in range(60) for word in make(TOKENIZER, 200, rng(seed))["outputs"]]
    assert len(sample["outputs"]) == count and len(set(many)) == alphabet and sample["chance"] == 1 / alphabet


def test_denoise_scatters_evenly():
    first = [make_denoise(TOKENIZER, 221, rng(seed))["input"].split() for seed in range(60)]
    blank = max(set(first[0]), key=first[0].count)
    places = [i for words in first for i, word in enumerate(words[:-1]) if word != blank]
    assert abs(np.mean(places) - 105) < 12


def test_words_are_scored_by_place():
    sample = {"outputs": ["a", "b", "c", "d"]}
    assert score_words(sample, " a b c d") == 1.0 and score_words(sample, "a c b d") == 0.5
    assert score_words(sample, "") == score_words(sample, "b c d a") == 0.0 and score_words(sample, "a b c d e f") == 1.0


def test_mqar_asks_every_key_once_and_gives_nothing_away():
    for seed in range(5):
        sample = make_mqar(TOKENIZER, 256, rng(seed), pairs=16, words=128)
        words = sample["input"].split()
        assert len(words) == 256
        pairs = dict(zip(words[0:32:2], words[1:32:2]))
        assert len(pairs) == len(set(pairs.values())) == 16 and not set(pairs) & set(pairs.values())
        asked = [sample["input"][:end].split()[-1] for end in sample["queries"]]
        assert sorted(asked) == sorted(pairs) and [pairs[key] for key in asked] == sample["outputs"]
        assert all(len(sample["input"][:end].split()) > 32 for end in sample["queries"])
        assert all(sample["input"][end : end + 1] in (" ", "") for end in sample["queries"])
        assert sample["chance"] == 1 / 64


# Stories


def track(facts):
    """Where people and things are and were, and who gave what, from the sentences alone."""
    at, holder, path, given = {}, {}, {thing: [] for thing in THINGS}, []
    for fact in facts:
        words = fact.rstrip(".").split()
        if words[-1] in ROOMS and words[0] in PEOPLE:
            at[words[0]] = words[-1]
            for thing, person in holder.items():
                if person == words[0]:
                    path[thing].append(words[-1])
        elif words[1] in GIVES and "to" in words:
            given.append((words[0], words[3], words[-1]))
        elif words[-1] in THINGS:
            thing = words[-1]
            taken = words[1] in ("picked", "took", "got")
            if taken and not path[thing]:
                path[thing].append(at[words[0]])
            if taken:
                assert holder.get(thing) is None and path[thing][-1] == at[words[0]]  # one takes what lies where one is
            else:
                assert holder[thing] == words[0]
            holder[thing] = words[0] if taken else None
    return at, path, given


@pytest.mark.parametrize("task", STORIES)
def test_stories_have_the_answer_they_say(task):
    answers = []
    for seed in range(40):
        facts, question, answer, labels = make_story(task, rng(seed))
        at, path, given = track(facts) if task != "babi_long_qa4" else ({}, {}, [])
        words = question.rstrip("?").split()
        if task == "babi_long_qa1":
            assert at[words[-1]] == answer
        elif task == "babi_long_qa2":
            assert path[words[-1]][-1] == answer
        elif task == "babi_long_qa3":
            seen = path[words[3]]
            assert seen.count(words[-1]) == 1 and seen[seen.index(words[-1]) - 1] == answer
        elif task == "babi_long_qa4":
            sides = {re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in facts}
            first, direction, second = (answer, words[2], words[-1]) if words[-1] != "of" else (words[3], words[4], answer)
            assert (first, direction, second) in sides and len(sides) == 2
        elif words[0] == "What":
            assert {x for g, x, t in given if (g, t) == (words[2], words[-1])} == {answer}
        elif words[1] == "gave":
            assert {g for g, x, t in given if (x, t) == (words[3], words[-1])} == {answer}
        else:
            assert {t for g, x, t in given if (g, x) == (words[2], words[5])} == {answer}
        assert answer in labels
        answers.append(answer)
    assert len(set(answers)) >= 4  # not one answer for all


@pytest.mark.parametrize("task", STORIES)
def test_facts_are_in_the_prose_in_order(task):
    sample = next(documents(task, TOKENIZER, 1500, 1))
    context = sample["input"].split("\n")[1]
    places = [context.index(fact) for fact in sample["facts"] if context.count(fact) == 1]
    assert places == sorted(places) and len(places) > 1
    assert all(fact in context for fact in sample["facts"])
    for fact in sorted(set(sample["facts"]), key=len, reverse=True):
        context = context.replace(fact, "")
    assert " ".join(context.split()) in " ".join(prose("test").split())  # and the rest is prose, held out


def test_labels_are_scored_alone():
    sample = {"outputs": ["garden"], "labels": list(ROOMS)}
    assert score_label(sample, " The garden.\nThe office") == score_label(sample, " GARDEN") == 1.0
    assert score_label(sample, " garden or office") == score_label(sample, " office") == score_label(sample, "") == 0.0


# Held-out prose


def test_pieces_are_the_text_and_start_at_words():
    assert bucket_edges(512) == [0, 128, 256, 512] and bucket_edges(300) == [0, 128, 256, 300] and bucket_edges(64) == [0, 64]
    for seed in range(5):
        sample = make_held_out(TOKENIZER, 1000, rng(seed))
        text, cuts = sample["input"], sample["cuts"]
        assert " ".join(text.split()) in " ".join(prose("test").split())
        assert cuts[0] == 0 and cuts[-1] == len(text) and all(text[cut] == " " for cut in cuts[1:-1])
        ids = TOKENIZER(text).input_ids
        pieces = [TOKENIZER(text[a:b]).input_ids for a, b in zip(cuts, cuts[1:])]
        assert [token for piece in pieces for token in piece] == ids  # cut where tokens end
        assert np.cumsum([0, *map(len, pieces)]).tolist() == sample["edges"] and sum(sample["bytes"]) == len(text.encode())
        assert all(0 <= edge - asked <= 6 for edge, asked in zip(sample["edges"][:-1], bucket_edges(1000)))


@pytest.mark.parametrize("length", [129, 130, 131, 257, 514])
def test_no_bucket_is_empty(length):
    for seed in range(20):
        sample = make_held_out(TOKENIZER, length, rng(seed))
        assert min(sample["bytes"]) > 0 and sample["edges"] == sorted(set(sample["edges"]))
        assert len(sample["bytes"]) == len(bucket_edges(length)) - 1 and sample["tokens"] in (length - 1, length)


def test_prose_is_not_said_twice():
    with pytest.raises(DoesNotFit, match=r"length 500000 is more than the held-out prose has with this tokenizer, at most \d+"):
        make_held_out(TOKENIZER, 500_000, rng())
    sample = make_held_out(TOKENIZER, 32_768, rng())
    assert sample["tokens"] in (32_767, 32_768)
