"""The report's arithmetic: intervals of means, bold only beyond doubt, labels that do not overlap, numbers in short."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memzoo.report import numbers
from memzoo.report.plots import _spread


def test_bold_only_where_intervals_lie_apart():
    best = numbers.best_beyond_doubt
    assert best([(0.9, (0.8, 0.95)), (0.5, (0.4, 0.6))]) == 0
    assert best([(0.5, (0.4, 0.6)), None, (0.9, (0.8, 0.95))]) == 2
    assert best([(0.9, (0.8, 0.95)), (0.85, (0.7, 0.9))]) is None
    assert best([(0.9, (0.8, 0.95)), (0.5, (0.4, 0.8))]) is None  # touching is not apart
    assert best([(0.9, (0.8, 0.95))]) is None
    assert best([(0.9, None), (0.1, (0.0, 0.2))]) is None
    assert best([(2.0, (1.9, 2.1)), (3.0, (2.9, 3.1))], higher_is_better=False) == 0


def test_a_means_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng, held, trials = random.Random(0), 0, 400
    shares, n = (0.95, 0.6, 0.3), 40
    for _ in range(trials):
        cells = []
        for share in shares:
            k = sum(rng.random() < share for _ in range(n))
            middle, half = _wilson(k, n)
            cells.append({"value": k / n, "interval": [middle - half, middle + half]})
        value, (low, high) = numbers.mean(cells)
        assert low <= value <= high
        held += low <= sum(shares) / len(shares) <= high
    assert 0.91 <= held / trials <= 0.99


def _wilson(k, n, z=1.96):
    middle = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    return middle, z / (1 + z * z / n) * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))


def test_a_mean_of_one_cell_is_that_cell_and_without_an_interval_there_is_none():
    value, span = numbers.mean([{"value": 0.5, "interval": [0.25, 1.0]}])
    assert value == 0.5 and span == (0.25, 1.0)
    assert numbers.mean([{"value": 0.5, "interval": [0.3, 0.6]}, {"value": 0.7, "interval": None}]) == (0.6, None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.2)), min_size=1, max_size=9))
def test_labels_never_overlap_and_stay_inside_where_they_fit(labels):
    labels.sort()
    wanted, tall = zip(*labels)
    places = _spread(wanted, tall)
    for (a, h), (b, g) in zip(zip(places, tall), list(zip(places, tall))[1:]):
        assert b - a >= (h + g) / 2 - 1e-9
    if sum(tall) <= 1:
        assert places[0] - tall[0] / 2 >= -1e-9 and places[-1] + tall[-1] / 2 <= 1 + 1e-9
    if len(labels) == 1:
        assert places[0] == pytest.approx(min(max(wanted[0], tall[0] / 2), 1 - tall[0] / 2))


def test_numbers_in_short():
    assert [numbers.short_length(n) for n in (1, 512, 1024, 1536, 131072, 1048576)] == ["1", "512", "1k", "1.5k", "128k", "1M"]
    assert [numbers.short_bytes(n) for n in (96, 20992, 1040 * 1024, 5 * 1024**3)] == ["96 B", "20.5 KiB", "1.02 MiB", "5 GiB"]
    assert [numbers.short_count(n) for n in (12, 344384, 1.234e9, 999e9)] == ["12", "344k", "1.23B", "999B"]
