"""The page and its pictures: whole, self-contained, showing what the store holds; and bad or missing parts of a store."""

import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from unittest.mock import patch

import made_up
import pytest
from html_check import Page

from memzoo.report import read_results, write_report
from memzoo.report.page import papers
from memzoo.report.plots import Plot, heat_map

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
spec = importlib.util.spec_from_file_location("report_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page, files, folder) of the whole invented store."""
    folder = tmp_path_factory.mktemp("report")
    results = read_results(made_up.write(folder / "results"))
    files = write_report(results, folder / "report.html", title="A & B <report>")
    return Page((folder / "report.html").read_text()), files, folder


def page_of(tmp_path, rows, gradients=False):
    """(page, files, results); without the pictures beside it, which take most of the time."""
    results = read_results(made_up.write(tmp_path / "results", rows, gradients))
    with patch.object(Plot, "save", lambda plot, folder: []):
        files = write_report(results, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text()), files, results


def test_the_page_is_well_formed_and_fetches_nothing(made):
    page, files, _ = made
    assert page.faults == []
    text = files[0].read_text()
    assert "<script" not in text and "@import" not in text
    assert not re.search(r"(?<!<a href=\")https?://", text)  # only links that a reader may follow
    assert text.startswith("<!DOCTYPE html>") and page.all("html", lang="en")
    assert page.all("meta", name="viewport")[0][0]["content"].startswith("width=device-width")
    assert [t for _, t in page.all("h1")] == ["A & B <report>"]


def test_the_checker_sees_faults():
    """The other tests' `faults == []` would mean little if it did not."""
    for bad in (
        "<p><b>x</p></b>", "<div>", '<img src="x.png">', '<p id="a"></p><p id="a"></p>', '<a href="#b">x</a>', '<link href="x.css">',
        '<p style="background:url(http://x/y.png)"></p>', '<p onclick="x()"></p>', "<div/>",
    ):  # fmt: skip
        assert Page(bad).faults, bad


def test_every_picture_is_inside_with_a_name_and_a_description(made):
    page, *_ = made
    pictures = page.all("svg")
    assert len(pictures) > 10 and not page.all("img")
    names = [a["aria-label"] for a, _ in pictures]
    assert all(a["role"] == "img" for a, _ in pictures) and all(names) and len(set(names)) == len(names)
    descriptions = [t for _, t in page.all("desc")]
    assert len(descriptions) == len(pictures) and min(map(len, descriptions)) > 40
    assert all("viewbox" in a and "width" not in a for a, _ in pictures)


def test_every_plot_is_also_a_png_and_an_svg_file(made):
    _, files, folder = made
    plots = sorted((folder / "report-plots").iterdir())
    assert sorted(files[1:]) == plots and len(plots) > 20
    stems = {path.stem for path in plots}
    assert {f"{stem}{end}" for stem in stems for end in (".png", ".svg")} == {path.name for path in plots}
    for path in plots:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
        else:
            ElementTree.parse(path)
    assert {"heatmap-niah-single-1", "state-bytes-niah", "flops-per-token-mqar", "bits-per-byte-by-position-prose"} <= stems
    assert {"gradient-flow-initialisation", "gradient-flow-trained", "length-niah-mean"} <= stems


def test_scores_intervals_and_bold(made):
    page, _, _ = made
    row = next(text for _, text in page.all("tr") if text.startswith("sdnc-link0.900.85"))  # mqar's
    assert row == "sdnc-link" + "0.900.85–0.93" * 5
    bold = [t for _, t in page.all("b")]
    # At 128 and 256 all models tie; beyond, sdnc-link's interval lies above the rest: mean of the needles, two of them, mqar, prose.
    assert bold == ["0.81"] * 3 + ["0.85"] * 3 + ["0.77"] * 3 + ["0.90"] * 3 + ["1.875"]


def test_heat_maps_show_every_depth_and_where_training_ended(tmp_path):
    results = read_results(made_up.write(tmp_path, made_up.cells(("titans-mac",))))
    text = heat_map(next(t for t in results.tasks if t.name == "niah_single_1"), results.models, "name", "title").svg()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert [w for w in words if w.endswith("%")] == ["0%", "25%", "50%", "75%", "100%"]
    cells = {
        (c["length"], d["depth"]): d["value"]
        for c in made_up.cells(("titans-mac",))
        if c["task"] == "niah_single_1"
        for d in c["cells"]
    }
    shown = sorted(w for w in words if re.fullmatch(r"1|0|\.\d\d", w))
    assert shown == sorted("1" if v == 1 else f"{v:.2f}".lstrip("0") if v else "0" for v in cells.values())
    assert any("trained at 256 (dashed)" in w for w in words)
    assert "titans-mac" in words and any("niah_single_1" in w for w in words)


def test_a_model_has_one_colour_everywhere(made):
    page, _, folder = made
    looks = {}
    for path in (folder / "report-plots").glob("*.svg"):
        for style, word in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', path.read_text()):
            if word in made_up.MODELS and "fill" in style:
                looks.setdefault(word, set()).add(re.search(r"fill: (#\w+)", style).group(1))
    assert set(looks) >= {"sdnc-link", "sdnc-window", "titans-mac"}
    assert all(len(colours) == 1 for colours in looks.values()) and len({c for x in looks.values() for c in x}) == len(looks)
    keys = {t: a["style"] for a, t in page.all("span", class_="key")}
    assert len(keys) == 1 and all("var(--series" in style for style in keys.values())  # swatches hold no text of their own


def test_costs_are_told_with_their_lengths(made):
    page, *_ = made
    told = next(
        t for _, t in page.all("desc") if t.startswith("accuracy against the bytes of state") and "0.90 for 130 KiB at 128" in t
    )
    assert "sdnc-link: 0.90 for 130 KiB at 128, 0.90 for 260 KiB at 256" in told
    assert "linear-transformer-gated-delta: 0.90 for 20.5 KiB at 128" in told


def test_the_papers_numbers_are_labelled_as_theirs(made):
    page, *_ = made
    asides = page.all("aside")
    tables = papers()["tables"]
    assert len(asides) == len(tables)
    for _, text in asides:
        assert text.startswith("their numbers") and "arXiv 2" in text and "Parameters: " in text and "Training tokens: " in text
    niah = page.all("section", id="suite-niah")[0][1]
    assert "Titans MAC99.298.899.098.499.698.2" in niah.replace("\n", "") and "S-NIAH-PK" in niah
    assert "their numbers" not in page.all("section", id="suite-mqar")[0][1]


def test_the_papers_data_is_whole():
    data = papers()
    for table in data["tables"]:
        assert table["paper"] in data["papers"] and {"table", "what", "suites", "scale", "tokens", "trained"} <= set(table)
        assert all(len(row) == len(table["columns"]) + 1 for row in table["rows"])
        assert sum(n for _, n in table.get("groups", [])) in (0, len(table["columns"]))
        if "percent" in table["what"] and "erplexity" not in table["what"]:
            assert all(0 <= x <= 100 for row in table["rows"] for x in row[1:] if x is not None)


BARE = (
    "cells",
    "interval",
    "state_bytes",
    "flops_per_token",
    "settings",
    "seed",
    "versions",
    "device",
    "date",
    "samples",
    "count",
    "correct",
)


@pytest.mark.parametrize(
    "case", ["bare", "one model", "one cell", "many models", "odd names", "same names", "no training length", "as they come"]
)
def test_what_is_missing_is_left_out(case, tmp_path):
    rows = [row for row in made_up.cells() if row["length"] in (128, 512, 2048) and row["task"] != "niah_single_2"]
    if case == "bare":
        rows = [{k: v for k, v in row.items() if k not in BARE} | {"model": {"name": row["model"]["name"]}} for row in rows]
    elif case == "one model":
        rows = [row for row in rows if row["model"]["name"] == "sdnc-link"]
    elif case == "one cell":
        rows = rows[:1]
    elif case == "many models":
        rows = [
            row | {"id": f"{row['id']}{i}", "model": row["model"] | {"name": f"{row['model']['name']}-{i}"}}
            for i in range(4) for row in rows if row["suite"] == "mqar"
        ]  # fmt: skip
    elif case == "odd names":
        names = {
            128: ("a<b>/c d", "ü & <i>"),
            512: ("ü", "ü & <i>"),
            2048: ("ä", "ü & <u>"),
        }  # alike once only plain letters are left
        model = rows[0]["model"] | {"name": '<b>"x" & $y_2$</b>'}
        rows = [row | {"model": model, "task": names[row["length"]][0], "suite": names[row["length"]][1]} for row in rows[:6]]
    elif case == "same names":
        rows = [row | {"model": row["model"] | {"name": "final"}} for row in rows]
    elif case == "no training length":
        rows = [row | {"model": row["model"] | {"training_length": None}} for row in rows]
    else:
        rows = [
            row | {"length": 0, "cells": [], "state_bytes": None, "flops_per_token": None} for row in rows if row["length"] == 128
        ]
    page, files, results = page_of(tmp_path, rows)
    assert page.faults == []
    text = files[0].read_text()
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().split() and "None" not in re.sub(r"<[^>]*>", " ", text)
    if case == "bare":
        assert "Score against cost" not in text and "<b>" not in text
    if case == "one model":
        assert "<b>" not in text
    if case == "many models":
        assert len(results.models) == 16
    if case == "odd names":
        assert any(text == '<b>"x" & $y_2$</b>' for _, text in page.all("th"))
        assert any("$y_2$" in text for _, text in page.all("text"))  # and not as mathematics
    if case == "same names":
        assert sorted(m.label for m in results.models) == sorted(f"final (runs/{name})" for name in made_up.MODELS)
    if case == "as they come":  # lm-eval's own tasks: no length, so a table and no plot
        assert not page.all("svg") and any(text == "any" for _, text in page.all("th"))
    if case == "no training length":
        assert "trained at" not in text


def test_gradient_flow_alone_makes_a_page(tmp_path):
    made_up.write(tmp_path, [], gradients=True)
    files = write_report(read_results(tmp_path), tmp_path / "page.html")
    page = Page(files[0].read_text())
    assert page.faults == [] and len(page.all("svg")) == 2


def run(capsys, *arguments):
    code = script.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "case,expected",
    [
        ("missing", "there is no results folder"),
        ("empty folder", "holds no results.jsonl"),
        ("empty file", "holds no result to show"),
        ("broken", "line 1 left out: not JSON"),
        ("another format", "format is 2, this memzoo reads 1"),
        ("no value", "line 1 left out: no value"),
    ],
)
def test_a_store_without_results_is_one_clear_line_and_leaves_the_page_alone(case, expected, tmp_path, capsys):
    folder, out = tmp_path / "results", tmp_path / "page.html"
    out.write_text("the last report")
    if case != "missing":
        folder.mkdir()
    lines = {
        "empty file": "", "broken": '{"format": 1, "id"\nnonsense\n', "another format": json.dumps({"format": 2}),
        "no value": json.dumps({k: v for k, v in made_up.cells()[0].items() if k != "value"}),
    }  # fmt: skip
    if case in lines:
        (folder / "results.jsonl").write_text(lines[case])
    code, printed, error = run(capsys, folder, "--out", out)
    assert code == 1 and expected in error and error.startswith("report: ") and error.count("\n") == 1
    assert out.read_text() == "the last report" and printed == ""


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    made_up.write(tmp_path, made_up.cells()[:1], gradients=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = run(capsys, tmp_path, "--out", tmp_path / "page.html")
    assert code == 1 and "pip install 'memzoo[eval]'" in error and error.count("\n") == 1


def test_reading_and_drawing_need_no_torch():
    code = "import sys, memzoo.report, memzoo.report.plots; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_line_cut_off_by_a_crash_is_left_out_and_named(tmp_path, capsys):
    rows = [row for row in made_up.cells(("sdnc-link",)) if row["suite"] == "mqar"]
    made_up.write(tmp_path / "results", rows, gradients=False)
    path = tmp_path / "results" / "results.jsonl"
    path.write_text(path.read_text() + json.dumps(rows[0])[:200])
    code, printed, error = run(capsys, tmp_path / "results", "--out", tmp_path / "page.html")
    assert code == 0 and f"line {len(rows) + 1} left out: not JSON" in error
    assert f"1 model, 1 task, {len(rows)} results" in printed
    assert "left out: not JSON" in (tmp_path / "page.html").read_text()


def test_a_model_that_fell_apart_is_named_and_the_others_shown(tmp_path):
    rows = [row for row in made_up.cells(("sdnc-link", "titans-mac")) if row["suite"] == "ppl_by_length"]
    nothing = {"loss": None, "bits_per_byte": None, "interval": [None, None]}
    broken = [rows[0]["cells"][0] | {"interval": [None, None]}, rows[0]["cells"][1], *(b | nothing for b in rows[0]["cells"][2:])]
    page, files, _ = page_of(tmp_path, [rows[0] | {"cells": broken}, rows[1] | {"value": None, "interval": None}])
    assert page.faults == [] and "titans-mac on prose at 2048 tokens has a score that is no number" in files[0].read_text()
    assert any(text.startswith("bits per byte of tokens") and "up to 256." in text for _, text in page.all("desc"))


def test_folders_of_stores_are_read_together_and_repeats_count_once(tmp_path):
    rows = made_up.cells(("sdnc-link", "sdnc-window"))
    made_up.write(tmp_path / "a", [r for r in rows if r["model"]["name"] == "sdnc-link"], gradients=False)
    made_up.write(tmp_path / "b", [r for r in rows if r["model"]["name"] == "sdnc-window"] + rows[:3], gradients=False)
    results = read_results(tmp_path)
    assert len(results.models) == 2 and len(results.cells) == len(rows)


def test_more_documents_supersede_fewer_and_difficulties_stay_apart(tmp_path):
    few = made_up.cell("sdnc-link", "mqar", "mqar", 128, 1.0, 10, id="few", settings={})
    many = made_up.cell("sdnc-link", "mqar", "mqar", 128, 0.5, 1000, id="many", settings={"limit": 1000})
    easy = made_up.cell("sdnc-link", "mqar", "mqar", 128, 0.9, 10, id="easy", settings={"difficulty": {"pairs": 2}})
    _, files, results = page_of(tmp_path, [many, few, easy])
    assert [(t.title, t.cells[0, 128]["value"]) for t in results.tasks] == [("mqar (as published)", 0.5), ("mqar (pairs 2)", 0.9)]
    assert "1 results not shown" in files[0].read_text()


def test_chance_is_drawn_where_it_is_known(tmp_path):
    rows = [
        made_up.cell(name, "babi_long", "qa1", n, 0.5, 50, id=f"{name}{n}", settings={}, chance=0.125)
        for name in ("sdnc-link", "titans-mac") for n in (128, 256)
    ]  # fmt: skip
    page, *_ = page_of(tmp_path, rows)
    assert [text for _, text in page.all("text")].count("chance") == 1  # of the curve against length; costs have no such line


def test_a_mean_over_tasks_is_over_the_same_tasks_for_all(tmp_path):
    """Neither a model that was not run on the hard task nor a length that it does not fit gets the mean of the easy one alone."""
    rows = []
    for name, easy, hard in (("sdnc-link", 1.0, 0.2), ("titans-mac", 0.9, 0.6)):
        for length in (128, 256, 512):
            rows.append(made_up.cell(name, "niah", "easy", length, easy, 50, id=f"{name}e{length}", settings={}))
            if length > 128:
                rows.append(made_up.cell(name, "niah", "hard", length, hard, 50, id=f"{name}h{length}", settings={}))
    page, *_ = page_of(tmp_path / "a", rows)
    lines = [text for _, text in page.all("tr")]
    first = next(i for i, line in enumerate(lines) if line.startswith("mean of 2 tasks"))
    assert lines[first + 1].startswith("sdnc-link–0.60") and lines[first + 2].startswith("titans-mac–0.75")
    rows.append(made_up.cell("sdnc-window", "niah", "easy", 256, 1.0, 50, id="w", settings={}))
    page, *_ = page_of(tmp_path / "b", rows)
    lines = [text for _, text in page.all("tr")]
    first = next(i for i, line in enumerate(lines) if line.startswith("mean of 2 tasks"))
    assert lines[first + 1].startswith("sdnc-link––0.60") and lines[first + 3].startswith("easy")


def test_needles_come_first_and_a_suite_that_nobody_can_do_shows_its_costs_in_its_own_place(tmp_path):
    rows = [
        made_up.cell(name, suite, suite, n, share, 50, id=f"{name}{suite}{n}", settings={})
        for suite, share in (("copy", 0.02), ("zebra", 0.4), ("niah", 0.9)) for name in ("sdnc-link", "titans-mac") for n in (128, 256)
    ]  # fmt: skip
    page, *_ = page_of(tmp_path, rows)
    sections = [a["id"] for a, _ in page.all("section")]
    assert sections == ["models", "cost", "suite-niah", "suite-copy", "suite-2", "papers", "reading"]
    ahead, copy = (page.all("section", id=name)[0][1] for name in ("cost", "suite-copy"))
    assert "niah: accuracy against state" in ahead and "zebra: accuracy against state" in ahead
    assert "copy: accuracy against state" in copy and "copy: accuracy against state" not in ahead
