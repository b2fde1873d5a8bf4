"""How every plot looks: colours that the colour-blind can tell apart, one for each model throughout, and themes the page can swap."""

from __future__ import annotations

from contextlib import contextmanager

INK, MUTED, GRID, PAPER = "#1c2530", "#5a6774", "#dfe4e9", "#ffffff"
ON_DARK, ON_LIGHT = "#fffffe", "#000001"  # text in coloured cells: the same in both themes, so no theme colour
# Dark enough for text on white (4.5 : 1), and apart from each other with any kind of colour vision, the first five above all.
SERIES = ("#1260b3", "#93380a", "#07836c", "#c72f9c", "#80740d", "#33107a", "#c3304f", "#4f7d00")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.6)))  # for the 9th model and on

# The page's variables: name, colour by light, colour by dark.
THEME = (
    ("ink", INK, "#e8edf2"),
    ("muted", MUTED, "#a3b0bd"),
    ("grid", GRID, "#333d47"),
    ("paper", PAPER, "#14191f"),
    *((f"series{i}", light, dark) for i, (light, dark) in enumerate(zip(
        SERIES, ("#3f9bfa", "#f28c3c", "#8fdcc2", "#ee5cb5", "#e8d98a", "#a195e5", "#fc5a74", "#b7e05a")
    ))),
)  # fmt: skip

# From nothing (light, warm) to all (dark, cool): lightness falls all the way, so it survives grey print.
HEAT = ("#fff3dc", "#fbd79a", "#c3c9a0", "#5fa5a8", "#216f95", "#0f3a63")

FONTS = ["DejaVu Sans"]  # what the layout is measured with; wide, so other fonts fit too


def colour(index: int | None) -> str:
    """A model's colour; grey for None, which is no model of the store but something to compare with."""
    return MUTED if index is None else SERIES[index % len(SERIES)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of sRGB in 0 to 1, as WCAG defines it."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Contrast of two colours, 1 to 21 (WCAG); text needs 4.5."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def ink_on(fill: tuple[float, float, float]) -> str:
    """Whichever of the light and the dark ink reads better on a coloured cell."""
    return max((ON_LIGHT, ON_DARK), key=lambda ink: contrast(rgb(ink), fill))


def dashes(index: int):
    return DASHES[min(index // len(SERIES), len(DASHES) - 1)]


@contextmanager
def plot_style():
    """matplotlib's settings for every plot, for the length of a with statement."""
    import matplotlib

    settings = {
        "font.family": FONTS,
        "font.size": 10.0,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.labelsize": 9.5,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
        "figure.facecolor": PAPER,
        "figure.dpi": 100,
        "text.color": INK,
        "text.parse_math": False,  # names may hold dollar signs
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "savefig.facecolor": PAPER,
        "svg.fonttype": "none",
        "svg.hashsalt": "memzoo",
    }
    with matplotlib.rc_context(settings):
        yield
