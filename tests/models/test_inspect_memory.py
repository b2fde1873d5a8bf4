"""scripts/inspect_memory.py: what it writes is what the memories did, and what it cannot read is one clear line."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import zoo

from memzoo.data.text import load_tokenizer, prose
from memzoo.layers.neural_memory import watch

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_memory.py"
spec = importlib.util.spec_from_file_location("inspect_memory_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def run(capsys, *arguments):
    code = script.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def checkpoint(tmp_path):
    model = zoo.model("titans-mag", vocab_size=4096, scale=1.0)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def test_json_and_table_say_what_the_memories_did(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    text = tmp_path / "text.txt"
    text.write_text("It was a very fine day, and the grass was green.\nAnne looked out of the window — twice.\n", encoding="utf-8")
    code, printed, error = run(capsys, folder, "--text", text, "--out", tmp_path / "out", "--layer", 0, "--top", 5)
    assert code == 0 and error == ""
    what = json.loads((tmp_path / "out" / "inspect_memory.json").read_text(encoding="utf-8"))
    ids = load_tokenizer()(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    assert what["ids"] == ids and len(what["tokens"]) == len(ids) and what["tokens"][:3] == ["It", " was", " a"]
    with watch(model) as memories, torch.no_grad():
        model(torch.tensor([ids]))
    assert [layer["name"] for layer in what["layers"]] == list(memories) and what["drawn"] == next(iter(memories))
    for layer, memory in zip(what["layers"], memories.values()):
        for name in ("surprise", "lr", "momentum", "decay", "weight_norm", "momentum_norm", "tokens"):
            torch.testing.assert_close(torch.tensor(layer[name]).double(), memory.observed[name][0].double(), rtol=1e-4, atol=1e-6)
        surprise = memory.observed["surprise"][0].mean(-1)
        places = [row["place"] for row in layer["most_surprising"]]
        assert places == surprise.argsort(descending=True)[:5].tolist()
        assert [row["token"] for row in layer["most_surprising"]] == [what["tokens"][place] for place in places]
    rows = printed.splitlines()[2:7]
    assert [int(row.split()[0]) for row in rows] == [row["place"] for row in what["layers"][0]["most_surprising"]]
    picture = (tmp_path / "out" / "inspect_memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "tokens"), [("titans-lmm-tiny", 1), ("titans-mac-tiny", 70), ("titans-mal-tiny", 300)])
def test_presets_read_held_out_prose(name, tokens, tmp_path, capsys):
    from matplotlib.image import imread

    code, printed, error = run(capsys, name, "--tokens", tokens, "--out", tmp_path)
    assert code == 0 and error == "" and f"most surprising of {tokens} tokens of held-out prose" in printed
    what = json.loads((tmp_path / "inspect_memory.json").read_text(encoding="utf-8"))
    assert prose("test").startswith("".join(what["tokens"])) and len(what["tokens"]) == tokens
    assert [len(layer["surprise"]) for layer in what["layers"]] == [tokens] * 2
    picture = imread(tmp_path / "inspect_memory.png")
    height, width = picture.shape[:2]
    assert 900 < height < 2500 and 900 < width < 2500
    assert picture[..., :3].std() > 0.05
    assert run(capsys, name, "--tokens", tokens, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "inspect_memory.json").read_text() == (tmp_path / "inspect_memory.json").read_text()


def test_tokens_as_labels():
    assert [script.shown(piece) for piece in (" was", "\n", " ", "\t", "�", "$x$", "\x00")] == [
        "was",
        "⏎",
        "␣",
        "⇥",
        "�",
        "$x$",
        "·",
    ]
    assert [script.short(name) for name in ("model.layers.3.mixer.memory", "", "memory")] == ["layer 3", "memory", "memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["titans-lmm-tin"], "titans-lmm-tin is neither a checkpoint (a folder with a config.json) nor a preset; did you mean"),
        (["{empty}"], "is not a model: it has no config.json"),
        (["sdnc-tiny"], "SDNCForCausalLM has no neural memory to watch"),
        (["titans-mag-tiny", "--text", "{missing}"], "No such file or directory"),
        (["titans-mag-tiny", "--text", "{blank}"], "the file is empty"),
        (["titans-mag-tiny", "--text", "{binary}"], "not UTF-8 text (invalid start byte at byte 0)"),
        (["titans-mag-tiny", "--tokenizer", "{empty}"], "holds no tokenizer (tokenizer.json)"),
        (["titans-mag-tiny", "--tokens", "0"], "length '0' is not a number of tokens such as 512 or 4k"),
        (["titans-mag-tiny", "--tokens", "9", "--layer", "2"], "--layer 2: the model has 2 neural memories, 0 to 1"),
        (["titans-mag-tiny", "--top", "0"], "--top needs at least 1"),
        (["{small}"], "the model knows 61: pass its own with --tokenizer"),
        (["titans-mag-tiny", "--tokens", "9", "--out", "{blank}"], "File exists"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("empty", "missing", "blank", "binary", "small")}
    places["empty"].mkdir()
    places["blank"].write_text(" \n\n")
    places["binary"].write_bytes(b"\xff\xfe\x00")
    zoo.model("titans-mag").save_pretrained(places["small"])
    arguments = [argument.format(**places) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "out"]
    code, printed, error = run(capsys, *arguments)
    assert code == 1 and printed == ""
    assert error.startswith("inspect_memory: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "inspect_memory.json").exists()
