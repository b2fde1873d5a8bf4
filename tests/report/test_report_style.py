"""The report's colours: readable on their ground, and apart for every kind of colour vision."""

import itertools

import pytest

from memzoo.report import style

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour, vision):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in style.rgb(colour)]
    r, g, b = (min(max(sum(m * x for m, x in zip(row, linear)), 0), 1) for row in VISION[vision])
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apart(one, other, vision):
    return sum((a - b) ** 2 for a, b in zip(lab(one, vision), lab(other, vision))) ** 0.5


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True])
def test_the_first_five_models_are_told_apart_by_colour_alone(vision, dark):
    colours = [theme[1 + dark] for theme in style.THEME if theme[0].startswith("series")][:5]
    for one, other in itertools.combinations(colours, 2):
        assert apart(one, other, vision) > 9, (one, other)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_stand_out_from_the_paper(dark):
    theme = {name: colours[dark] for name, *colours in style.THEME}
    paper = style.rgb(theme["paper"])
    assert style.contrast(style.rgb(theme["ink"]), paper) > 10
    for name, colour in theme.items():
        if name not in ("paper", "grid", "ink"):
            assert style.contrast(style.rgb(colour), paper) >= 4.5, name


def test_heat_map_gets_darker_all_the_way_and_its_numbers_are_readable():
    shades = [style.luminance(style.rgb(colour)) for colour in style.HEAT]
    assert shades == sorted(shades, reverse=True)
    from matplotlib.colors import LinearSegmentedColormap

    heat = LinearSegmentedColormap.from_list("heat", style.HEAT)
    for step in range(101):
        fill = heat(step / 100)[:3]
        assert style.contrast(style.rgb(style.ink_on(fill)), fill) >= 4.5


def test_models_past_the_colours_differ_in_dashes():
    looks = {(style.colour(i), style.marker(i), str(style.dashes(i))) for i in range(16)}
    assert len(looks) == 16


def test_no_two_theme_colours_are_alike_since_the_page_finds_them_by_value():
    lights = [light for _, light, _ in style.THEME] + [style.ON_DARK, style.ON_LIGHT, *style.HEAT]
    assert len({light.lower() for light in lights}) == len(lights)
