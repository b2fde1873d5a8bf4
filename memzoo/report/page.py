"""The page itself: sections, tables and plots put together as one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from . import plots
from .numbers import best_beyond_doubt, interval, score, short_bytes, short_count, short_length
from .store import Model, Results, Task
from .style import SERIES
from .stylesheet import stylesheet

SUITES = {
    "niah": ("Needles in a haystack", "Facts hidden in prose, asked for at the end; RULER's tasks and scoring."),
    "vt": ("Variable tracking", "RULER's chains of assignments, scattered in noise."),
    "cwe": ("Common words", "RULER's most common words of a long list."),
    "fwe": ("Frequent words", "RULER's most frequent coded words."),
    "mqar": ("Associative recall", "Many keys with values, then the keys again in another order: Zoology's multi-query recall."),
    "selective_copy": ("Selective copying", "Repeat the marked tokens, leave the noise."),
    "copy": ("Copying", "Repeat the first tokens after a long delay."),
    "denoise": ("Denoising", "Recall symbols scattered among blanks, after a marker."),
    "transfer": ("Transfer of copying", "Copying at delays beyond those trained on."),
    "babi_long": ("Facts in long prose", "Questions about facts scattered in unrelated prose, as BABILong asks them."),
    "ruler": ("RULER", "lm-eval's own tasks."),
    "babilong": ("BABILong", "lm-eval's own tasks."),
    "longbench": ("LongBench", "lm-eval's own tasks."),
    "longbench2": ("LongBench v2", "lm-eval's own tasks."),
    "fda": ("In-context retrieval: FDA", "lm-eval's own task."),
    "swde": ("In-context retrieval: SWDE", "lm-eval's own task."),
    "squad_completion": ("In-context retrieval: SQuAD", "lm-eval's own task."),
    "wikitext": ("WikiText", "lm-eval's own task."),
    "lambada": ("LAMBADA", "lm-eval's own task."),
    "commonsense": ("Commonsense", "lm-eval's own tasks, those of the papers."),
    "ppl_by_length": (
        "Language modelling by position",
        "Loss on held-out prose by the position of the token: who gains from context?",
    ),
}

WORTH = 0.1  # a suite where no model scores more says nothing about costs, so its cost plots stay in its own section


def write_report(
    results: Results, out: str | Path, *, title: str = "memzoo report", progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Write the page, and every plot as PNG and SVG in a folder beside it; return all the files, the page first.

    Args:
        results: what `read_results` returned.
        out: the page, such as report.html; the folder is report-plots.
        title: the page's heading.
        progress: called with each part's name before it is drawn.
    """
    out = Path(out)
    folder = out.with_name(f"{out.stem}-plots")
    say = progress or (lambda part: None)
    files: list[Path] = []
    taken: set[str] = set()

    def keep(plot: plots.Plot, on_disk: bool = True) -> None:
        """Give the plot a name that no other has, its file's and its elements' on the page."""
        name, number = plot.name or "plot", 2
        plot.name = name
        while plot.name in taken:
            plot.name, number = f"{name}-{number}", number + 1
        taken.add(plot.name)
        if on_disk:
            files.extend(plot.save(folder))

    drawn = {}
    for suite, tasks in results.suites.items():
        say(suite)
        drawn[suite] = plots.suite_plots(suite, tasks, results)
        together = drawn[suite].pop("together")
        for part, group in drawn[suite].items():
            for plot in group:
                keep(plot, on_disk=part != "heat" or not together)
        for plot in together:
            keep(plot)
    flows = []
    for flow in results.gradient_flow:
        say("gradient flow")
        for when in dict.fromkeys(curve["when"] for curve in flow["curves"]):
            plot = plots.gradient_flow(flow, results.models, when)
            flows.append((flow, plot))
            keep(plot)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(_page(results, drawn, flows, title), encoding="utf-8")
    temporary.replace(out)
    return [out, *files]


def papers() -> dict:
    """The papers' own numbers, as papers.json holds them."""
    return json.loads((Path(__file__).parent / "papers.json").read_text(encoding="utf-8"))


def _page(results: Results, drawn: dict, flows: list, title: str) -> str:
    theirs, used = papers(), []
    sections = []
    if results.models:
        sections.append(("models", "Models", _models(results)))
    ahead = [plot for parts in drawn.values() for plot in parts["cost"] if plot.best >= WORTH]
    if ahead:
        sections.append(("cost", "Score against cost", _costs(ahead)))
    for number, (suite, tasks) in enumerate(results.suites.items()):
        beside = [table for table in theirs["tables"] if suite in table["suites"]]
        used += beside
        body = _suite(suite, tasks, drawn[suite], results.models) + "".join(_their_table(t, theirs["papers"]) for t in beside)
        sections.append((f"suite-{plots.slug(suite) if suite in SUITES else number}", SUITES.get(suite, (suite, ""))[0], body))
    if flows:
        sections.append(("gradient-flow", "Gradient flow", _flows(flows)))
    others = [table for table in theirs["tables"] if table not in used]
    sections.append(("papers", "The papers' own numbers", _papers(others, theirs["papers"], bool(used))))
    sections.append(("reading", "How to read this", _reading(results)))
    menu = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>{content}</section>'
        for name, heading, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{stylesheet()}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lede">{escape(_summary(results))}</p></header>
<nav aria-label="Sections"><ul>{menu}</ul></nav>
<main>{body}</main>
<footer>{escape(_made_with(results))}</footer>
</body>
</html>
"""


# ------------------------------------------------------------------------------------------------------------------ sections


def _summary(results: Results) -> str:
    if not results.cells:
        return "How far the gradient of a loss reaches back through each memory."
    documents = sum(cell.get("count") or 0 for cell in results.cells)
    dates = sorted({str(cell["date"])[:10] for cell in results.cells if cell.get("date")})
    dates = [date.replace("-", "\u2011") for date in dates]  # hyphens that do not break
    when = "" if not dates else f", {dates[0]}" if len(dates) == 1 else f", {dates[0]} to {dates[-1]}"
    return (
        f"{_count(len(results.models), 'model')} on {_count(len(results.tasks), 'task')} of {_count(len(results.suites), 'suite')}: "
        f"{_count(len(results.cells), 'result')} from {documents:,} scored documents{when}. "
        "Which memory remembers, how far, and what does it cost?"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _models(results: Results) -> str:
    rows = []
    for model in results.models:
        cells = sorted((c for task in results.tasks for c in task.of(model).values()), key=lambda c: c["length"])
        info = model.info
        rows.append(
            [
                _name(model),
                escape(str(info.get("model_type") or "")),
                short_count(info["parameters"]) if info.get("parameters") else "",
                short_length(info["training_length"]) if info.get("training_length") else "",
                short_count(info["training_tokens"]) if info.get("training_tokens") else "",
                _range(cells, "state_bytes", short_bytes),
                _range(cells, "flops_per_token", short_count),
                escape(str(info.get("dtype") or "")),
            ]
        )
    headings = ["model", "architecture", "parameters", "trained at", "trained on", "state", "FLOPs per token", "type"]
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    head = "".join(f'<th scope="col"{_text(headings[i])}>{headings[i]}</th>' for i in kept)
    body = "".join("<tr>" + "".join(_cell(row[i], i == 0, headings[i]) for i in kept) + "</tr>" for row in rows)
    lengths = sorted({cell["length"] for cell in results.cells} - {0}) or [0]
    caption = f"State and FLOPs for one sequence of {_lengths(lengths)} tokens; lengths and tokens trained on where known."
    return _table(caption, head, body)


def _cell(content: str, first: bool, heading: str) -> str:
    return f'<th scope="row">{content}</th>' if first else f"<td{_text(heading)}>{content}</td>"


def _text(heading: str) -> str:
    return ' class="text"' if heading in ("architecture", "type") else ""


def _lengths(lengths: Sequence[int]) -> str:
    return short_length(lengths[0]) if len(lengths) == 1 else f"{short_length(lengths[0])} to {short_length(lengths[-1])}"


def _range(cells: Sequence[dict], field: str, shown: Callable[[float], str]) -> str:
    known = [cell[field] for cell in cells if isinstance(cell.get(field), (int, float))]
    if not known:
        return ""
    low, high = shown(min(known)), shown(max(known))
    return low if low == high else f"{low} to {high}"


def _costs(ahead: Sequence[plots.Plot]) -> str:
    text = (
        "<p>Each path is one model from its shortest input to its longest, the larger the mark the longer. Up is better, left is cheaper: "
        "a memory of fixed size goes straight down when it forgets, attention pays to the right.</p>"
    )
    return text + _figures(ahead)


def _suite(suite: str, tasks: Sequence[Task], parts: dict, models: Sequence[Model]) -> str:
    about = SUITES.get(suite, ("", ""))[1]
    out = f"<p>{escape(about)}</p>" if about else ""
    asked = {task.asked: [t.title for t in tasks if t.asked == task.asked] for task in tasks if task.asked}
    for difficulty, names in asked.items():
        which = "" if len(names) == len(tasks) else f" ({', '.join(names)})"
        out += f'<p class="note">Not as published{escape(which)}: {escape(difficulty)}.</p>'
    if parts["heat"]:
        out += "<h3>By depth and length</h3>" + _figures(parts["heat"])
    if parts["length"]:
        out += "<h3>By length</h3>" + _figures(parts["length"])
    if behind := [plot for plot in parts["cost"] if plot.best < WORTH] + parts["cost by task"]:
        out += "<h3>Against cost</h3>" + _figures(behind)
    if parts["position"]:
        out += "<h3>By position</h3>" + _figures(parts["position"])
    return out + "<h3>Scores</h3>" + _scores(tasks, models)


def _scores(tasks: Sequence[Task], models: Sequence[Model]) -> str:
    """One table a suite: a group of rows a task, a row a model, a column a length; the mean over tasks first where there are several."""
    lengths = sorted({n for task in tasks for n in task.lengths})
    groups = []
    shared, found = plots.averages([task for task in tasks if task.share], models)
    if len(shared) > 1:
        scores = {(i, p.length): (p.value, p.span) for i, points in found.items() for p in points}
        which = "" if len(shared) == len(tasks) else f": {', '.join(task.title for task in shared)}"
        groups.append((f"mean of {len(shared)} tasks", f"{shared[0].metric}{which}", "", scores, True))
    for task in tasks:
        scores = {place: (cell["value"], interval(cell)) for place, cell in task.cells.items()}
        counts = sorted({cell["count"] for cell in task.cells.values() if cell.get("count")})
        number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else ""
        better = "" if task.higher_is_better else "lower is better, "
        groups.append(
            (task.title, task.metric, better + (f"{number} documents a cell" if number else ""), scores, task.higher_is_better)
        )
    body = ""
    for name, metric, about, scores, higher in groups:
        about = ", ".join(filter(None, (metric.replace("_", " "), about)))
        heading = f"{escape(name)}<small>{escape(about)}</small>"
        body += f'<tr class="group"><th scope="rowgroup" colspan="{len(lengths) + 1}">{heading}</th></tr>'
        drawn = [model for model in models if any((model.index, n) in scores for n in lengths)]
        best = {n: best_beyond_doubt([scores.get((model.index, n)) for model in drawn], higher) for n in lengths}
        for row, model in enumerate(drawn):
            body += f'<tr><th scope="row">{_name(model)}</th>'
            body += "".join(_score(scores.get((model.index, n)), metric, best[n] == row) for n in lengths) + "</tr>"
    head = '<th scope="col">length (tokens)</th>' + "".join(f'<th scope="col">{short_length(n)}</th>' for n in lengths)
    caption = "Score, with its 95% interval below. Bold: the best of its column, where its interval lies apart from every other's."
    return _table(caption, head, body)


def _score(found: tuple | None, metric: str, best: bool) -> str:
    if found is None:
        return "<td>–</td>"
    value, span = found
    shown = f"<b>{score(value, metric)}</b>" if best else score(value, metric)
    return f"<td>{shown}{'' if span is None else f'<small>{score(span[0], metric)}–{score(span[1], metric)}</small>'}</td>"


def _flows(flows: list) -> str:
    out = (
        "<p>The norm of the gradient of the last token's loss with respect to the hidden state of an earlier token, where it enters the "
        "first block, as Kerg et al. (2020) look at it: a plain recurrent net forgets exponentially, attention does not. Relative to the "
        "token of the loss itself (lag 0); grey: the two anchors.</p>"
    )
    out += _figures(plot for _, plot in flows)
    for flow in {id(flow): flow for flow, _ in flows}.values():
        about = [f"{_count(flow['length'], 'token')} a sequence" if flow.get("length") else "", str(flow.get("measured") or "")]
        out += f'<p class="note">{escape("; ".join(filter(None, about)))}</p>' if any(about) else ""
    return out


def _papers(tables: Sequence[dict], sources: dict, some_above: bool) -> str:
    text = "<p>Reported by the authors, on their data and at their scale: not measured here, and not comparable with tiny models."
    text += " More of them stand beside the suites above.</p>" if some_above else "</p>"
    return text + f'<div class="beside">{"".join(_their_table(table, sources) for table in tables)}</div>'


def _their_table(table: dict, sources: dict) -> str:
    source = sources[table["paper"]]
    about = f"Parameters: {table['scale']}. Training tokens: {table['tokens']}. Trained at: {table['trained']}."
    note = f" {table['note']}" if table.get("note") else ""
    groups = table.get("groups") or [["", len(table["columns"])]]
    starts = {sum(n for _, n in groups[:i]) for i in range(1, len(groups))}

    # As many digits as the paper gives in that column.
    columns = list(zip(*(row[1:] for row in table["rows"])))
    digits = [max(len(str(x).partition(".")[2]) for x in column if x is not None) for column in columns]

    def edge(i: int) -> str:
        return ' class="sep"' if i in starts else ""

    head = '<th scope="col"></th>' + "".join(f'<th scope="col"{edge(i)}>{escape(c)}</th>' for i, c in enumerate(table["columns"]))
    above = ""
    if table.get("groups"):
        at, above = 0, "<th></th>"
        for name, wide in groups:
            above += f'<th scope="colgroup" colspan="{wide}"{edge(at)}>{escape(name)}</th>'
            at += wide
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{edge(i)}>{'–' if x is None else f'{x:.{digits[i]}f}'}</td>" for i, x in enumerate(row[1:]))
        + "</tr>"
        for row in table["rows"]
    )
    heading = f"{escape(source['title'])}, {escape(table['table'])}"
    return (
        f'<aside class="theirs{" wide" if len(digits) > 4 else ""}"><h4><span class="tag">their numbers</span>{heading}</h4>'
        f'<p class="note">{escape(source["authors"])}, <a href="https://arxiv.org/abs/{source["arxiv"]}">arXiv {source["arxiv"]}</a>. '
        f"{escape(about + note)}</p>{_table(escape(table['what']) + '.', head, body, above)}</aside>"
    )


def _reading(results: Results) -> str:
    facts = {
        "intervals": "95%: Wilson's for shares of right answers, else from the spread over documents. A mean over tasks joins its tasks' "
        "intervals.",
        "state": "bytes that one sequence of that length keeps between tokens: a key and a value a token for attention, one state for a "
        "recurrent memory.",
        "FLOPs per token": "products with weights, states and rows in one forward pass, a multiply-add counting 2, averaged over the "
        "sequence; element-wise work left out.",
        "training length": "dashed lines: what lies beyond, no model has seen in training.",
    }
    out = '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items()) + "</dl>"
    if results.notes:
        out += "<h3>Left out</h3>" + "".join(f'<p class="note">{escape(note)}</p>' for note in results.notes)
    return out


def _made_with(results: Results) -> str:
    versions: dict[str, set[str]] = {}
    for cell in results.cells:
        for package, version in (cell.get("versions") or {}).items():
            versions.setdefault(package, set()).add(str(version))
    devices = sorted({str(cell["device"]) for cell in results.cells if cell.get("device")})
    seeds = sorted({str(cell["seed"]) for cell in results.cells if cell.get("seed") is not None})
    parts = ["Made by memzoo's scripts/report.py"]
    parts += ["measured on " + ", ".join(devices)] if devices else []
    parts += [("seed " if len(seeds) == 1 else "seeds ") + ", ".join(seeds)] if seeds else []
    parts += [f"{package} {' and '.join(sorted(found))}" for package, found in versions.items()]
    return "; ".join(parts) + "."


# -------------------------------------------------------------------------------------------------------------------- pieces


def _name(model: Model) -> str:
    return f'<span class="key" style="background:var(--series{model.index % len(SERIES)})"></span>{escape(model.label)}'


def _figures(found: Iterable[plots.Plot]) -> str:
    return '<div class="plots">' + "".join(f"<figure>{plot.inline()}</figure>" for plot in found) + "</div>"


def _table(caption: str, head: str, body: str, above: str = "") -> str:
    above = f"<tr>{above}</tr>" if above else ""
    label = escape(caption, quote=True)
    return (
        f'<p class="note caption">{caption}</p><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead>{above}<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
