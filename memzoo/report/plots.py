"""The report's plots: small vector figures, each with a description in words, that read alike on a page, a phone and paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .numbers import Interval, interval, mean, score, short_bytes, short_count, short_length
from .store import Model, Results, Task
from .style import GRID, HEAT, INK, MUTED, THEME, colour, dashes, ink_on, marker, plot_style

WIDTH, HEIGHT = 4.7, 3.3  # inches: text of 9 points stays readable when a phone shows the figure at its own width


@dataclass
class Plot:
    """One figure. `name` is its file's, `title` a headline, `text` what it shows, in words; `best` the highest score in it."""

    name: str
    title: str
    text: str
    figure: Any = field(repr=False)
    best: float | None = None

    def svg(self) -> str:
        """The figure as an SVG file's text, in the light theme."""
        with plot_style():
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(buffer, format="svg", metadata=nothing)
        return buffer.getvalue()

    def inline(self) -> str:
        """The figure as an element of a page: no width of its own, colours that follow the page's theme, ids that are the page's only."""
        text = self.svg()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        size = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', text)
        head = re.sub(r'\s(?:width|height|xmlns(?::\w+)?|version)="[^"]*"', "", text[: text.index(">")])
        body = text[text.index(">") :]
        body = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", body)
        body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{self.name}-\1"', body)
        body = re.sub(r"(?<=font: )([^;\"]*?)'DejaVu Sans'", r"\1var(--sans)", body)
        for variable, light, _ in THEME:
            body = body.replace(light, f"var(--{variable})")
        label = f"<title>{_escape(self.title)}</title><desc>{_escape(self.text)}</desc>"
        named = f' role="img" aria-label="{_escape(self.title)}" style="max-width:{1.6 * float(size.group(1)):.0f}px"'
        return head + named + body.replace(">", ">" + label, 1)

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.png."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        paths[0].write_text(self.svg(), encoding="utf-8")
        with plot_style():
            self.figure.savefig(paths[1], format="png", dpi=200)
        return paths


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


# ------------------------------------------------------------------------------------------------------------- what is drawn


@dataclass
class Point:
    length: int
    value: float
    span: Interval
    cell: dict = field(repr=False)  # one of the cells behind the value: cost is the same in all of them


def averages(tasks: Sequence[Task], models: Sequence[Model]) -> tuple[list[Task], dict[int, list[Point]]]:
    """(tasks, points by length for every model index): means over one set of tasks, the same for all models and lengths.

    It is the largest set that every model has that was run at some length at all; lengths at which one of them is missing are left out,
    since a mean over other tasks says nothing beside it.
    """
    shared: dict[int, list[Task]] = {}
    present: dict[int, list[Model]] = {}
    for length in sorted({n for task in tasks for n in task.lengths if n > 0}):
        present[length] = [m for m in models if any((m.index, length) in task.cells for task in tasks)]
        shared[length] = [task for task in tasks if all((m.index, length) in task.cells for m in present[length])]
    chosen = max(shared.values(), key=len, default=[])
    found: dict[int, list[Point]] = {}
    for length, held in shared.items():
        if chosen and all(any(task is other for other in held) for task in chosen):
            for model in present[length]:
                cells = [task.cells[model.index, length] for task in chosen]
                value, span = mean(cells)
                found.setdefault(model.index, []).append(Point(length, value, span, cells[0]))
    return chosen, found


def single(task: Task, models: Sequence[Model]) -> dict[int, list[Point]]:
    """One task's points by length for every model index."""
    return {
        m.index: points
        for m in models
        if (points := [Point(n, c["value"], interval(c), c) for n, c in task.of(m).items() if n > 0])
    }


# ------------------------------------------------------------------------------------------------------------------ figures


def _figure(width: float = WIDTH, height: float = HEIGHT, columns: int = 1, rows: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _wrapped(label: str, width: int = 16) -> str:
    """A long name on up to three lines, broken after hyphens, slashes and spaces."""
    lines = [""]
    for part in re.findall(r"[^-/ _]+[-/ _]?|[-/ _]", label):
        if len(lines[-1]) + len(part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    lines = [line.strip() for line in lines]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2] + "…"])


def _label_ends(axes, ends: Sequence[tuple[float, float, str, int | None]]) -> None:
    """Names at the right, each level with its curve's end if others leave it room; a thin line leads there if the end is elsewhere."""
    if not ends:
        return
    figure = axes.figure
    box, (inches_wide, inches_high) = axes.get_position(), figure.get_size_inches()
    points = inches_high * 72 * box.height
    texts = [_wrapped(name) for _, _, name, _ in ends]
    longest = max(len(line) for text in texts for line in text.split("\n"))
    free = inches_wide * 72 * (1 - box.x1 - 0.045 * box.width)  # points to the figure's right edge
    size = min(9.0 if len(ends) <= 7 else 8.0, max(free / (0.71 * longest), 6.5))
    tall = [1.25 * size * (text.count("\n") + 1) / points for text in texts]
    inverse = axes.transAxes.inverted()
    at = [inverse.transform(axes.transData.transform((x, y))) for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: at[i][1])
    places = _spread([at[i][1] for i in order], [tall[i] for i in order])
    leader = {"arrowstyle": "-", "lw": 0.7, "alpha": 0.55, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    for place, i in zip(places, order):
        index = ends[i][3]
        axes.annotate(
            texts[i], xy=at[i], xytext=(1.045, place), xycoords="axes fraction", textcoords="axes fraction", va="center", ha="left",
            fontsize=size, color=colour(index), fontweight="bold", linespacing=1.1, annotation_clip=False,
            arrowprops={"color": colour(index), **leader},
        )  # fmt: skip


def _spread(wanted: Sequence[float], tall: Sequence[float]) -> list[float]:
    """Centres for stacked labels in order, as near as can be to those wanted, none overlapping, all within 0 to 1 where they fit."""
    blocks: list[tuple[list[float], list[float]]] = []  # (wanted, tall) of labels that touch

    def centre(block):
        offset, shifts = 0.0, []
        for want, size in zip(*block):
            shifts.append(want - (offset + size / 2))
            offset += size
        start = sum(shifts) / len(shifts)
        return min(max(start, 0.0), max(1.0 - offset, 0.0)), offset

    for want, size in zip(wanted, tall):
        blocks.append(([want], [size]))
        while len(blocks) > 1:
            (low, below), (high, _) = centre(blocks[-2]), centre(blocks[-1])
            if low + below <= high + 1e-9:
                break
            last = blocks.pop()
            blocks[-1][0].extend(last[0])
            blocks[-1][1].extend(last[1])
    places = []
    for block in blocks:
        start, _ = centre(block)
        for size in block[1]:
            places.append(start + size / 2)
            start += size
    return places


def _lengths_axis(axes, lengths: Iterable[float], name: str) -> None:
    lengths = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    step = max(1, math.ceil(len(lengths) / 7))
    ticks = lengths[::-1][::step][::-1]
    axes.set_xticks(ticks, [short_length(n) for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(name)
    pad = 2**0.25
    axes.set_xlim(lengths[0] / pad, lengths[-1] * pad)


def _mark_training(axes, models: Sequence[Model]) -> None:
    """A dashed line where training lengths end; one in each model's colour if they differ."""
    known = [(m.training_length, m.index) for m in models if m.training_length]
    low, high = axes.get_xlim()
    distinct = {n for n, _ in known}
    for n in sorted(distinct):
        if not low < n < high:
            text = f"← trained at {short_length(n)}" if n <= low else f"trained at {short_length(n)} →"
            if len(distinct) == 1:
                axes.annotate(
                    text, xy=(float(n > low), 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", fontsize=9,
                    color=MUTED, ha="right" if n > low else "left", va="bottom",
                )  # fmt: skip
            continue
        shared = len(distinct) == 1
        line = INK if shared else colour(next(i for m, i in known if m == n))
        axes.axvline(n, color=line, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        right = (math.log(n) - math.log(low)) / (math.log(high) - math.log(low)) > 0.6
        axes.annotate(
            f"trained at {short_length(n)}", xy=(n, 1.0), xycoords=("data", "axes fraction"), xytext=(-4 if right else 4, 3),
            textcoords="offset points", ha="right" if right else "left", va="bottom", fontsize=9, color=line if not shared else MUTED,
        )  # fmt: skip


def _place(figure, right: float = 0.735, left: float = 0.135, top: float = 0.85, bottom: float = 0.165) -> None:
    figure.subplots_adjust(left=left, right=right, top=top, bottom=bottom)


def _title(figure, text: str, left: float = 0.02) -> None:
    size = min(10.5, figure.get_size_inches()[0] * 72 * (0.99 - left) / (0.62 * len(text)))  # DejaVu Sans Bold's mean width
    figure.text(left, 0.985, text, ha="left", va="top", fontsize=size, fontweight="bold", color=INK)


def _share_axis(axes, metric: str) -> None:
    axes.set_ylim(-0.03, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(axis="y")


def _draw_curve(axes, xs, ys, spans, index: int, **options) -> None:
    for x, span in zip(xs, spans):
        if span is not None:
            axes.plot([x, x], span, color=colour(index), linewidth=3.2, alpha=0.22, solid_capstyle="butt", zorder=2)
    axes.plot(
        xs,
        ys,
        color=colour(index),
        marker=marker(index),
        linestyle=dashes(index),
        markersize=5,
        markeredgewidth=0,
        zorder=3,
        **options,
    )


def against_length(name: str, title: str, found: dict[int, list[Point]], models: Sequence[Model], metric: str, share: bool) -> Plot:
    """Score against length, one curve a model, the training length marked."""
    with plot_style():
        figure, grid = _figure()
        axes = grid[0][0]
        _place(figure)
        drawn = [m for m in models if m.index in found]
        _lengths_axis(axes, (p.length for points in found.values() for p in points), "length (tokens)")
        if share:
            _share_axis(axes, metric)
        else:
            axes.set_ylabel(metric.replace("_", " "))
            axes.grid(axis="y")
        ends = []
        for number, model in enumerate(drawn):
            points = found[model.index]
            ys = [p.value for p in points]
            aside = 2 ** (0.05 * (number - (len(drawn) - 1) / 2)) if len(drawn) <= 6 else 1.0  # so that equal scores all show
            _draw_curve(axes, [p.length * aside for p in points], ys, [p.span for p in points], model.index)
            ends.append((points[-1].length * aside, ys[-1], model.label, model.index))
        chances = {p.length: p.cell["chance"] for points in found.values() for p in points if (p.cell.get("chance") or 0) > 0.02}
        if chances and share and "mean of" not in title:
            lengths = sorted(chances)
            axes.plot(lengths, [chances[n] for n in lengths], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(
                "chance", xy=(lengths[0], chances[lengths[0]]), xytext=(0, 3), textcoords="offset points", fontsize=8.5, color=MUTED
            )
        _mark_training(axes, drawn)
        _label_ends(axes, ends)
        _title(figure, title)
    said = "; ".join(
        f"{m.label}: " + ", ".join(f"{score(p.value, metric)} at {short_length(p.length)}" for p in found[m.index]) for m in drawn
    )
    return Plot(name, title, f"{metric.replace('_', ' ')} against length. {said}.", figure)


def against_cost(
    name: str, title: str, found: dict[int, list[Point]], models: Sequence[Model], metric: str, cost: str
) -> Plot | None:
    """A share against what it costs (`cost` is "state_bytes" or "flops_per_token"), a path a model from its shortest to its longest
    input; None if no model has a cost."""
    paths = {}
    for index, points in found.items():
        priced = [p for p in points if isinstance(p.cell.get(cost), (int, float)) and p.cell[cost] > 0]
        if priced:
            paths[index] = priced
    if not paths:
        return None
    state = cost == "state_bytes"
    shown = short_bytes if state else short_count
    with plot_style():
        figure, grid = _figure()
        axes = grid[0][0]
        _place(figure, top=0.9)
        axes.set_xscale("log")
        costs = [p.cell[cost] for points in paths.values() for p in points]
        room = max((max(costs) / min(costs)) ** 0.08, 1.25)
        axes.set_xlim(min(costs) / room, max(costs) * room)
        _cost_ticks(axes, shown, 1024 if state else 1000)
        axes.set_xlabel("state of one sequence (bytes, log scale)" if state else "FLOPs per token (log scale)")
        _share_axis(axes, metric)
        axes.set_ylim(-0.03, 1.12)  # room for a name above a mark at 1
        axes.grid(axis="x", which="major")
        ends = []
        for model in models:
            if model.index not in paths:
                continue
            points = paths[model.index]
            xs, ys = [p.cell[cost] for p in points], [p.value for p in points]
            _draw_curve(axes, xs, ys, [p.span for p in points], model.index, alpha=0.9)
            sizes = [26 + 90 * i / max(len(xs) - 1, 1) for i in range(len(xs))]
            axes.scatter(xs, ys, s=sizes, color=colour(model.index), marker=marker(model.index), linewidths=0, zorder=4)
            if xs[-1] > 1.5 * xs[0]:  # a path straight down has no room, and its marks' sizes tell
                _name_length(axes, xs[0], ys[0], points[0].length, sizes[0])
                _name_length(axes, xs[-1], ys[-1], points[-1].length, sizes[-1])
            ends.append((xs[-1], ys[-1], model.label, model.index))
        _label_ends(axes, ends)
        _title(figure, title)
    said = "; ".join(
        f"{m.label}: "
        + ", ".join(f"{score(p.value, metric)} for {shown(p.cell[cost])} at {short_length(p.length)}" for p in paths[m.index])
        for m in models
        if m.index in paths
    )
    best = max(p.value for points in paths.values() for p in points)
    what = "the bytes of state of one sequence" if state else "FLOPs per token"
    return Plot(name, title, f"{metric.replace('_', ' ')} against {what}; larger marks are longer inputs. {said}.", figure, best)


def _cost_ticks(axes, shown, base: int) -> None:
    """Round ticks, two to five of them where the axis holds that many."""
    low, high = axes.get_xlim()
    if base == 1024:
        scales = [
            [2.0**e for e in range(0, 60, 2)],
            [2.0**e for e in range(60)],
            [m * 2.0**e / 4 for e in range(60) for m in (4, 5, 6, 7)],
        ]
    else:
        scales = [[m * 10.0**e for e in range(18) for m in ms] for ms in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(10, 100, 5))]
    inside: list[float] = []
    for scale in scales:
        inside = [c for c in scale if low <= c <= high]
        if len(inside) >= 3:
            break
    step = max(1, math.ceil(len(inside) / 5))
    axes.set_xticks(inside[::step], [shown(c) for c in inside[::step]])
    axes.set_xticks([], minor=True)


def _name_length(axes, x: float, y: float, length: int, size: float) -> None:
    axes.annotate(
        short_length(length), xy=(x, y), xytext=(0, 3 + math.sqrt(size) / 2), textcoords="offset points", fontsize=8.5, color=MUTED,
        ha="center", va="bottom", zorder=5,
    )  # fmt: skip


def by_position(task: Task, models: Sequence[Model], unit: str) -> Plot | None:
    """Loss or bits per byte by the position of the token, from each model's longest cell; None if no cell has buckets."""
    longest = {}
    for model in models:
        with_buckets = [c for c in task.of(model).values() if any(b.get(unit) is not None for b in c.get("cells") or [])]
        if with_buckets:
            longest[model.index] = [b for b in with_buckets[-1]["cells"] if b.get(unit) is not None]
    if not longest:
        return None
    called = unit.replace("_", " ")
    title = f"{called[0].upper()}{called[1:]} by position: {task.title}"
    with plot_style():
        figure, grid = _figure()
        axes = grid[0][0]
        _place(figure)
        edges = [b["to"] for buckets in longest.values() for b in buckets if b["to"] > 0]
        _lengths_axis(axes, edges, "position of the token")
        axes.set_xlim(left=min(edges) / 2.4)
        axes.set_ylabel(called)
        axes.grid(axis="y")
        drawn = [m for m in models if m.index in longest]
        ends = []
        for model in drawn:
            buckets = longest[model.index]
            xs = [math.sqrt(max(b["from"], b["to"] / 4) * b["to"]) for b in buckets]  # the middle of a bucket on this axis
            ys = [b[unit] for b in buckets]
            spans = [interval(b) if unit == task.metric else None for b in buckets]
            _draw_curve(axes, xs, ys, spans, model.index)
            ends.append((xs[-1], ys[-1], model.label, model.index))
        _mark_training(axes, drawn)
        _label_ends(axes, ends)
        _title(figure, title)
    said = "; ".join(
        f"{m.label}: " + ", ".join(f"{b[unit]:.3f} up to {short_length(b['to'])}" for b in longest[m.index]) for m in drawn
    )
    return Plot(slug(unit, "by-position", task.title), title, f"{called} of tokens by their position. {said}.", figure)


def heat_map(task: Task, models: Sequence[Model], name: str, title: str) -> Plot | None:
    """Score by depth and length, one panel a model; None if no cell has depths."""
    panels = []
    for model in models:
        grid = {(c["depth"], n): c for n, cell in task.of(model).items() for c in cell.get("cells") or [] if "depth" in c}
        if grid:
            panels.append((model, grid))
    if not panels:
        return None
    lengths = sorted({n for _, grid in panels for _, n in grid})
    depths = sorted({d for _, grid in panels for d, _ in grid})
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    panel_height = 0.31 * max(len(depths), 2) + 0.92
    single = len(panels) == 1
    with plot_style():
        figure, grid_of_axes = _figure(WIDTH * columns, panel_height * rows + (0.0 if single else 0.3), columns, rows)
        height = figure.get_size_inches()[1]
        # Each panel keeps 0.48 inches above (its title) and 0.44 below (ticks and their name).
        figure.subplots_adjust(
            left=0.62 / (WIDTH * columns), right=1 - 0.12 / (WIDTH * columns), wspace=0.19,
            top=1 - (0.48 + (0.0 if single else 0.3)) / height, bottom=0.44 / height, hspace=0.92 / (panel_height - 0.92),
        )  # fmt: skip
        flat = [axes for row in grid_of_axes for axes in row]
        for axes in flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (model, cells) in zip(flat, panels):
            _heat_panel(axes, model, cells, lengths, depths, task, together=not single)
        if not single:
            _title(figure, title, left=0.01)
    said = "; ".join(
        f"{model.label}: "
        + ", ".join(
            f"{short_length(n)}: "
            + " ".join(score(cells[d, n]["value"], task.metric) if (d, n) in cells else "none" for d in depths)
            for n in lengths
        )
        for model, cells in panels
    )
    order = ", ".join(f"{d:.0%}" for d in depths)
    text = f"{task.metric} by length and depth of the needle (depths {order}). {said}."
    return Plot(name, title, text, figure)


def _heat_panel(axes, model: Model, cells: dict, lengths: list[int], depths: list[float], task: Task, together: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("memzoo", HEAT)
    for j, n in enumerate(lengths):
        for i, d in enumerate(depths):
            box = (j - 0.48, i - 0.46)
            cell = cells.get((d, n))
            if cell is None:
                axes.add_patch(Rectangle(box, 0.96, 0.92, facecolor="none", edgecolor=GRID, linewidth=0.8))
                continue
            value = cell["value"]
            fill = colours(min(max(value, 0.0), 1.0))
            axes.add_patch(Rectangle(box, 0.96, 0.92, facecolor=fill, edgecolor=GRID, linewidth=0.5))
            shown = "1" if value == 1 else f"{value:.2f}".lstrip("0") if value else "0"
            size = 9.5 if len(lengths) <= 7 else 8
            axes.text(j, i, shown, ha="center", va="center", fontsize=size, color=ink_on(fill[:3]))
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [short_length(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes.tick_params(length=0, pad=3)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("length (tokens)", labelpad=2)
    axes.set_ylabel("depth", labelpad=2)
    axes.set_title(model.label, color=colour(model.index), pad=17, fontsize=10.5)
    counts = {c["count"] for c in cells.values() if c.get("count")}
    each = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}" if counts else ""
    about = [task.metric.replace("_", " ") if together else task.title] + ([f"{each} documents a cell"] if each else [])
    trained = model.training_length
    inside = sum(n <= trained for n in lengths) if trained else 0
    if trained and not inside:
        about.append(f"trained at {short_length(trained)}")
    elif inside:
        axes.axvline(inside - 0.5, color=INK, linestyle=(0, (4, 3)), linewidth=1.3, zorder=4)
        about.append(f"trained at {short_length(trained)} (dashed)")
    axes.annotate(
        ", ".join(about), xy=(0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", fontsize=8.5, color=MUTED,
        ha="left", va="bottom",
    )  # fmt: skip


def gradient_flow(flow: dict, results_models: Sequence[Model], when: str) -> Plot | None:
    """Norm of the last token's loss's gradient by lag, both on log axes, one curve an architecture; None if nothing was measured then."""
    drawn = [c for c in flow["curves"] if c["when"] == when]
    if not drawn:
        return None
    names = {c["name"] for c in drawn}
    before = [c for c in flow["curves"] if c["when"] == "initialisation" and c["name"] in names and when != "initialisation"]
    labels = {model.label: model.index for model in results_models}
    anchors = [c["name"] for c in drawn if c.get("anchor")]
    # An architecture that the store does not know keeps one colour too, whenever it is measured.
    free = iter(i for i in range(1000) if i not in labels.values())
    others = dict.fromkeys(c["name"] for c in flow["curves"] if not c.get("anchor") and c["name"] not in labels)
    indices = {**labels, **{name: next(free) for name in others}}
    where = {"initialisation": "at initialisation", "trained": "after training"}.get(when, when)
    title = f"How far a loss reaches back, {where}"
    with plot_style():
        figure, grid = _figure(WIDTH, 3.5)
        axes = grid[0][0]
        _place(figure, left=0.16, top=0.88, bottom=0.15)
        axes.set_yscale("log")
        floor = 1e-10
        lags = [lag for c in drawn for lag in c["lags"] if lag > 0]
        _lengths_axis(axes, _powers(min(lags), max(lags)), "lag: tokens between the state and the loss")
        axes.set_xlim(min(lags) / 1.15, max(lags) * 1.15)
        ends, greys = [], 0
        for c in drawn:
            kept = [(lag, norm) for lag, norm in zip(c["lags"], c["norms"]) if lag > 0 and norm >= floor / 10]
            if not kept:
                continue
            xs, ys = zip(*kept)
            anchor = c["name"] in anchors
            if anchor:
                style = {"color": MUTED, "linestyle": [(0, (5, 2)), (0, (1.2, 1.6))][greys % 2], "linewidth": 1.8}
                greys += 1
            else:
                style = {"color": colour(indices[c["name"]]), "linestyle": dashes(indices[c["name"]])}
            axes.plot(xs, ys, zorder=2 if anchor else 3, **style)
            ends.append((xs[-1], max(ys[-1], floor), c["name"], None if anchor else indices[c["name"]]))
        for c in before:
            thin = {"color": colour(indices[c["name"]]), "linewidth": 0.9, "linestyle": (0, (2, 2)), "alpha": 0.8}
            axes.plot(c["lags"][1:], c["norms"][1:], zorder=2, **thin)
        if before:
            axes.annotate(
                "dotted: at initialisation", xy=(0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", fontsize=9,
                color=MUTED, va="bottom",
            )  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, floor), high)
        low, high = (math.log10(x) for x in axes.get_ylim())
        step = 2 if high - low > 5 else 1
        powers = range(math.ceil(low - 1e-9), math.floor(high) + 1)[::-1][::step]
        axes.set_yticks([10.0**e for e in powers], [f"10{_raised(e)}" for e in powers])
        axes.set_yticks([], minor=True)
        axes.set_ylabel("gradient's norm, relative to lag 0")
        axes.grid(axis="y")
        _label_ends(axes, ends)
        _title(figure, title)
    said = "; ".join(f"{c['name']}: {c['norms'][-1]:.2g} of lag 0's at lag {c['lags'][-1]}" for c in drawn)
    text = (
        f"Norm of the gradient of the last token's loss with respect to earlier tokens' states, by lag, relative to lag 0. {said}."
    )
    return Plot(slug("gradient-flow", when), title, text, figure)


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _powers(low: float, high: float) -> list[int]:
    return [2**e for e in range(40) if low <= 2**e <= high] or [int(low), int(high)]


def _costs(name: str, title: str, points: dict[int, list[Point]], models: Sequence[Model], metric: str) -> list[Plot]:
    drawn = []
    for cost, called in (("state_bytes", "state"), ("flops_per_token", "FLOPs per token")):
        plot = against_cost(slug(cost, name), f"{title}: {metric} against {called}", points, models, metric, cost)
        drawn += [plot] if plot else []
    return drawn


def suite_plots(suite: str, tasks: Sequence[Task], results: Results) -> dict[str, list[Plot]]:
    """Everything drawn of one suite: "cost" (and "cost by task" where several can be done), "length", "position", "heat", and in "together"
    the heat maps of a task's models in one."""
    models = results.models
    found: dict[str, list[Plot]] = {part: [] for part in ("cost", "cost by task", "length", "position", "heat", "together")}
    chosen, points = averages([task for task in tasks if task.share], models)
    if chosen:
        metric = chosen[0].metric.replace("_", " ")
        what = f"{suite}, mean of {len(chosen)} tasks" if len(chosen) > 1 else chosen[0].title
        if len(chosen) > 1:
            found["length"].append(against_length(slug("length", suite, "mean"), f"{what}: {metric}", points, models, metric, True))
        found["cost"] = _costs(suite, what, points, models, metric)
    for task in tasks:
        positions = [plot for unit in ("bits_per_byte", "loss") if (plot := by_position(task, models, unit))][:1]
        found["position"] += positions
        points = single(task, models)
        if points and not positions:
            title = f"{task.title}: {task.metric.replace('_', ' ')} by length"
            name = slug("length", *dict.fromkeys((suite, task.title)))
            found["length"].append(against_length(name, title, points, models, task.metric, task.share))
        if task.share and len(chosen) > 1 and max((p.value for ps in points.values() for p in ps), default=0) >= 0.5:
            found["cost by task"] += _costs(task.title, task.title, points, models, task.metric)
        name = slug("heatmap", task.title)
        panels = []
        for model in models:
            plot = heat_map(task, [model], f"{name}-{slug(model.label)}", f"{task.title}: {model.label}")
            panels += [plot] if plot else []
        found["heat"] += panels
        if len(panels) > 1:
            found["together"].append(heat_map(task, models, name, f"{task.title}: {task.metric} by depth and length"))
    return found
