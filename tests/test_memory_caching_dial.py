"""scripts/memory_caching_dial.py: counts are what the operators do, crossings are found, no time of a CPU is kept, errors are one line."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from memzoo.kernels import memory_caching

SCRIPT = Path(__file__).parents[1] / "scripts" / "memory_caching_dial.py"
spec = importlib.util.spec_from_file_location("memory_caching_dial_script", SCRIPT)
dial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dial)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the script on tiny sizes as on a machine without a GPU."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the other tests' business
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments):
        tiny = ["--length", "80", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--out", str(tmp_path)]
        return dial.main([*tiny, *arguments])

    return run


def test_segments_go_from_short_to_the_whole():
    assert dial.segment_lengths(32) == [16, 32]
    assert dial.segment_lengths(100) == [16, 32, 64, 100]
    assert dial.segment_lengths(4096) == [16 << i for i in range(9)]


@pytest.mark.parametrize("mixer", dial.READS)
def test_operations_are_those_of_every_token(mixer):
    """Token by token: what it scores, what it reads."""
    length, segment, dim = 100, 16, 24
    total = 0
    for t in range(length):
        cached = t // segment
        read = min(cached, dial.TOP_K) if "sparse" in mixer else cached
        score = 2 * dim**2 if "energy" in mixer else 2 * dim
        online = 2 * score if "energy" in mixer else score  # the open segment's matrix is written too
        total += 4 * dim**2 + read * 2 * dim**2 + cached * score + online
    assert dial.counts(mixer, segment, length, dim, 4)["operations"] == pytest.approx(total / length)


@pytest.mark.parametrize("mixer", dial.READS)
@pytest.mark.parametrize("length", [63, 64])
def test_state_is_that_of_the_operator(mixer, length):
    q = torch.randn(1, length, 1, 16)
    _, state = memory_caching(q, q, q, q, segment_length=16, output_final_state=True, **dial.READS[mixer])
    held = sum(x.numel() * 4 for x in (state.memory, *state.cached, state.pooled, state.descriptors))
    counted = dial.counts(mixer, 16, length, 16, 4)
    assert counted["state_bytes"] == held
    # Inputs and output once, and the three memories that a token reads, with their descriptors, written and read.
    described = 16**2 if "energy" in mixer else 16
    assert counted["bytes"] == pytest.approx(5 * 16 * 4 + 2 * 3 * (16**2 + described) * 4 / length)


def test_others_are_counted():
    attention, linear = (dial.counts(other, 64, 64, 16, 2) for other in ("attention", "linear_attention"))
    assert attention == {"operations": 4 * 16 * sum(range(1, 65)) / 64, "state_bytes": 2 * 64 * 16 * 2, "bytes": 4 * 16 * 2}
    assert linear == {"operations": 4 * 16**2, "state_bytes": 16**2 * 4, "bytes": 4 * 16 * 2}


def test_floor_is_the_slower_of_operations_and_bytes():
    row = {"operations": 100, "bytes": 10}
    assert dial.floor(row, "forward", 8, 3, (50.0, 1000.0)) == 6
    assert dial.floor(row, "forward", 8, 3, (1e9, 5.0)) == 6
    assert dial.floor(row, "forward+backward", 8, 3, (50.0, 1000.0)) == 18
    assert dial.floor(row, "forward+backward", 8, 3, (1e9, 4.0)) == 21


def test_crossings():
    lengths = [16, 32, 64, 128]
    assert dial.crossings(lengths, [48 / n for n in lengths]) == pytest.approx([48])  # a power law is a line on logarithmic axes
    assert dial.crossings(lengths, [2, 0.5, 2, 2]) == pytest.approx([16 * 2**0.5, 32 * 2**0.5])
    assert dial.crossings(lengths, [3, 2, 1.5, 1.1]) == []


def test_results_are_ratios_without_a_time(command, tmp_path, capsys):
    assert command() == 0
    text = (tmp_path / dial.JSON).read_text()
    result = json.loads(text)
    assert '"ms"' not in text and result["device"].startswith("cpu")
    assert [(row["mixer"], row["segment_length"], row["segments"]) for row in result["rows"]] == [
        (mixer, n, s) for mixer in dial.READS for n, s in ((16, 5), (32, 3), (64, 2), (80, 1))
    ]
    for row in (*result["rows"], *result["others"].values()):
        assert all(row[name]["x_linear_attention"] > 0 and row[name]["x_floor"] > 0 for name in dial.PASSES)
    assert all(row[name]["x_attention"] > 0 for row in result["rows"] for name in dial.PASSES)
    assert result["others"]["linear_attention"]["forward"]["x_linear_attention"] == 1
    assert (tmp_path / dial.PICTURE).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for mixer in dial.READS:
        for key in ("operations", "state bytes", "forward", "forward[+]backward"):
            assert re.search(f"{re.escape(mixer)}: {key}: (crosses attention at|above attention|below attention)", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [dial.JSON, dial.PICTURE]


def test_ratios_are_of_the_turn_they_were_measured_in(command, tmp_path, monkeypatch):
    """A machine that slows down from turn to turn changes no ratio: memories take twice linear attention's time, attention four times."""
    last, calls, real = [""], [0], dial.calls

    def marked(name, run):
        def call(segment):
            last[0] = name
            return run(segment)

        return call

    def slowing(call, device):
        call()
        calls[0] += 1
        turn = -(-calls[0] // 3)  # of three calls: both others and the memory
        return turn * {"linear_attention": 1, "attention": 4}.get(last[0], 2)

    monkeypatch.setattr(dial, "calls", lambda *a: {name: marked(name, run) for name, run in real(*a).items()})
    monkeypatch.setattr(dial, "rates", lambda device, dtype: (1.0, 1.0))
    monkeypatch.setattr(dial, "seconds", slowing)
    assert command("--repeats", "3") == 0
    result = json.loads((tmp_path / dial.JSON).read_text())
    assert {(row[name]["x_linear_attention"], row[name]["x_attention"]) for row in result["rows"] for name in dial.PASSES} == {
        (2, 0.5)
    }
    assert result["others"]["attention"]["forward"]["x_linear_attention"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "16"], "--length is 16, needs at least 32"),
        (["--length", "4kb"], "length '4kb' is not a number of tokens such as 512 or 4k"),
        (["--heads", "0"], "--heads is 0, needs at least 1"),
        (["--repeats", "0"], "--repeats is 0, needs at least 1"),
        (["--head-dim", "20"], "--head-dim is 20, needs a multiple of 8 from 16 to 256"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(command, tmp_path, capsys, arguments, message):
    assert command(*arguments) == 1
    assert capsys.readouterr().err == f"memory_caching_dial: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(command, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert command("--out", str(tmp_path / "file")) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_figures_are_kept_without_matplotlib(command, tmp_path, monkeypatch, capsys):
    measured = json.loads((SCRIPT.parents[1] / "benchmarks" / "memory_caching" / dial.JSON).read_text())
    monkeypatch.setattr(dial, "measure", lambda *arguments: measured)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command() == 1
    assert capsys.readouterr().err == "memory_caching_dial: import of matplotlib halted; None in sys.modules\n"
    assert json.loads((tmp_path / dial.JSON).read_text()) == measured
    assert [path.name for path in tmp_path.iterdir()] == [dial.JSON]
