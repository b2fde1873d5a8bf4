"""The shipped prose and tokenizer: what is in them, that text survives them, and that the tokenizer can be rebuilt."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memzoo.data import load_tokenizer, prose, tokenizer_path
from memzoo.data.words import ADJECTIVES, NOUNS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prose_is_plain_english():
    text = prose()
    assert 2_000_000 < len(text) < 2_500_000
    assert text.isascii() and not set(text) & set("_*[]{}<>|#@\\\t\r")
    assert "gutenberg" not in text.lower() and "CHAPTER" not in text
    paragraphs = text.splitlines()
    assert all(p == " ".join(p.split()) and p for p in paragraphs)
    assert text.split()[:4] == ["The", "family", "of", "Dashwood"]


def test_splits_are_disjoint_and_complete():
    train, test = prose("train"), prose("test")
    assert train + test == prose()
    assert abs(len(test) / len(prose()) - 0.1) < 0.001
    assert train.endswith("\n") and test[0] != "\n"
    assert not {p for p in train.splitlines() if len(p) > 80} & set(test.splitlines())
    with pytest.raises(ValueError, match="split is 'validation'"):
        prose("validation")


def test_tokenizer_loads_by_the_auto_class(tokenizer):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(tokenizer_path())
    assert isinstance(loaded, PreTrainedTokenizerFast) and len(loaded) == 4096
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left"
    assert loaded("text").input_ids == loaded("text", add_special_tokens=False).input_ids


@given(st.text())
def test_any_text_makes_the_round_trip(text):
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "tabs\tand  two spaces \n\n new\r\nlines ",
        "naïve 漢字 🙂 ½ ٣٤ e\u0301",
        " leading",
        "1234567",
        "x=12;y=0345",
        "it's 'tis",
        "",
    ],
)
def test_awkward_text_makes_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_numbers_are_pairs_of_digits(tokenizer):
    assert tokenizer.tokenize(" 1234567.") == ["Ġ12", "34", "56", "7", "."]
    for number in range(100):
        assert len(tokenizer(f" {number}").input_ids) == len(tokenizer(f"{number:02d}").input_ids) == 1


def test_words_of_keys_are_one_symbol_each(tokenizer):
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS) and not set(ADJECTIVES) & set(NOUNS)
    for word in [f" {w}" for w in ADJECTIVES + NOUNS] + [f"-{w}" for w in NOUNS]:
        assert len(tokenizer(word).input_ids) == 1, word


def test_text_may_be_cut_at_any_space(tokenizer):
    words = prose("test")[:20_000].replace("\n", " ").split(" ")
    pieces = [tokenizer(piece).input_ids for piece in (words[0], *(f" {w}" for w in words[1:]))]
    assert [token for piece in pieces for token in piece] == tokenizer(" ".join(words)).input_ids


def test_tokenizer_is_good_at_prose(tokenizer):
    text = prose("test")
    assert len(text) / len(tokenizer(text).input_ids) > 3.9


def test_tokenizer_can_be_rebuilt(tmp_path, monkeypatch, capsys):
    script = load_script("build_tokenizer")
    monkeypatch.setattr("sys.argv", ["build_tokenizer.py", "--output", str(tmp_path)])
    script.main()
    assert "4096 symbols" in capsys.readouterr().out
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads(Path(tokenizer_path(), file).read_text())


def test_no_tokenizer_is_one_clear_line(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="load_tokenizer: ") as error:
            load_tokenizer(place)
        assert "\n" not in str(error.value) and str(place) in str(error.value)


def r_string(text):
    body = text.encode()
    return (9 | 1 << 18).to_bytes(4, "big") + len(body).to_bytes(4, "big") + body


def test_prose_script_reads_r_vectors_and_paragraphs():
    import zlib

    script = load_script("build_prose")
    lines = [
        "TITLE",
        "",
        "by someone",
        "",
        "CHAPTER 1",
        "",
        "It was _late_",
        "and dark.",
        "",
        "(End of volume one.)",
        "",
        "Chapter 2",
        "",
        '"No."',
        "",
        "THE END",
    ]
    stream = b"X\n\0\0\0\3\0\4\2\1\0\3\5\0\0\0\0\5UTF-8" + (16).to_bytes(4, "big") + len(lines).to_bytes(4, "big")
    stream += b"".join(map(r_string, lines))
    packed = len(stream).to_bytes(4, "big") + zlib.compress(stream)
    assert script.read_vectors(packed * 2) == [lines, lines]
    assert script.paragraphs(lines) == ["It was late and dark.", '"No."']
