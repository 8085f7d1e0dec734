"""Labels and ticks of the charts."""

from __future__ import annotations

import itertools
import re

import pytest

from lbr_dist.report.charts import Line, _apart, measured_lines, training_curve


@pytest.mark.parametrize(
    "ends", [(2.9, 2.9, 2.9), (2.9, 2.905, 4.0), (0.0, 0.0, 9.0), (9.0, 9.0, 9.0), (5.0, 1.0, 5.0)]
)
def test_labels_at_the_ends_stay_apart_ordered_and_inside(ends: tuple[float, ...]) -> None:
    places = _apart(ends, 1.5, 0.0, 9.0)
    assert all(upper - lower >= 1.5 - 1e-6 for lower, upper in itertools.pairwise(sorted(places)))
    assert min(places) >= 0 and max(places) <= 9
    for (end, place), (other_end, other_place) in itertools.combinations(zip(ends, places, strict=True), 2):
        assert end == other_end or (end < other_end) == (place < other_place)


def test_labels_of_equal_values_spread_around_them() -> None:
    assert sorted(_apart((5.0, 5.0, 5.0), 1.0, 0.0, 9.0)) == pytest.approx([4, 5, 6])


def test_labels_of_nearly_equal_lines_do_not_overlap() -> None:
    lines = [Line([0, 10], [4.0, 2.9 + i / 1000], f"line {i}", f"line {i}", i) for i in range(3)]
    svg = measured_lines(lines, "Agreeing", (340, 220), 112, "x")
    heights = [float(y) for y in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>line \d 2.90</text>', svg)]
    assert len(heights) == 3
    assert all(upper - lower >= 15 for lower, upper in itertools.pairwise(sorted(heights)))


def ticks(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("first", "rise", "longest"), [(2.89, 1e-7, 5), (0.0, 0.0, 5), (0.0, 1e-7, 9), (2e6, 1.0, 9), (1e4, 100.0, 6)]
)
def test_ticks_are_plain_numbers(first: float, rise: float, longest: int) -> None:
    steps, values = range(0, 50_000, 1000), [first + rise * i for i in range(50)]
    for svg in (
        training_curve(steps, values, "t", "learn", "x"),
        measured_lines([Line(steps, values, "t")], "t", (350, 190), 62, "x"),
    ):
        assert all(re.fullmatch(r"\N{MINUS SIGN}?\d{1,3}(,\d{3})*(\.\d+)?", tick) for tick in ticks(svg))
        below, beside = (re.findall(rf'id="x-{axis}tick_\d.*?<text[^>]*>([^<]*)<', svg, re.S) for axis in "xy")
        assert len(below) >= 3 and "20,000" in below
        assert len(beside) == len(set(beside)) >= 2 and max(map(len, beside)) <= longest


def test_a_diverged_perplexity_has_short_ticks() -> None:
    drawn = ticks(measured_lines([Line([0, 9], [20.0, 5.54e34], "t")], "t", (350, 190), 62, "x"))
    assert drawn[-1] == "5.5e+34" and max(map(len, drawn)) <= 7


@pytest.mark.parametrize("step", [0, 7])
def test_a_single_point_has_its_step_as_the_only_tick_below(step: int) -> None:
    curve = ticks(training_curve([step], [1.5], "t", "learn", "x"))
    line = ticks(measured_lines([Line([step], [1.5], "t")], "t", (350, 190), 62, "x"))
    assert [tick for tick in curve if "." not in tick] == [str(step)]
    assert [tick for tick in line if "." not in tick] == [str(step)] and line[-1] == "1.50"
