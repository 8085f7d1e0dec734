"""The report's charts, drawn by matplotlib and returned as SVG to be inlined in the page.

Charts are drawn in stand-in colours, which are then replaced by CSS variables, so that one SVG suits both the light and
the dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# stand-in -> CSS variable of the page; the values only have to differ from one another
_STAND_INS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--rule",
    "#040404": "--bm25",
    "#050505": "--base",
    "#060606": "--learn",
    "#070707": "--lbr",
    "#080808": "--other",
    "#090909": "--warn",
}
_COLOUR = {variable: stand_in for stand_in, variable in _STAND_INS.items()}
_INK, _MUTED, _RULE, _WARN = (_COLOUR[name] for name in ("--ink", "--muted", "--rule", "--warn"))

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "text.parse_math": False,
    "font.size": 12,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
}
_MOST_POINTS = 240


def system_variable(system: str) -> str:
    """The CSS variable that holds a system's colour, the same everywhere on the page."""
    return f"--{system}" if f"--{system}" in _COLOUR else "--other"


def score_bars(
    systems: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], measure: str, width: int, prefix: str
) -> str:
    """Horizontal bars of one metric between 0 and 1, with `MEASURE_interval` if it is given.

    Args:
        systems: system -> its scores; systems without the metric are left out.
        labels: system -> the name above its bar.
        width: drawn width in CSS pixels.
        prefix: put before every id inside the picture, to keep ids unique in the page.
    """
    rows = [
        (name, float(scores[measure]), scores.get(f"{measure}_interval"))
        for name, scores in systems.items()
        if scores.get(measure) is not None
    ]
    height = 54 * len(rows) + 30
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((2 / width, 26 / height, 1 - 16 / width, 1 - 28 / height))
        for row, (name, score, interval) in enumerate(rows):
            axes.barh(row, score, height=0.32, color=_COLOUR[system_variable(name)])
            axes.text(0, row - 0.27, labels.get(name, name), va="bottom", fontsize=13)
            if interval:
                axes.plot(interval, [row, row], color=_INK, linewidth=1.4, solid_capstyle="butt")
                for end in interval:
                    axes.plot([end, end], [row - 0.08, row + 0.08], color=_INK, linewidth=1.4)
            axes.text(1, row - 0.27, f"{score:.3f}", va="bottom", ha="right", fontsize=13, fontweight="bold")
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.7, -0.68), yticks=[], xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set_xticklabels(["0", "0.25", "0.5", "0.75", "1"])
        axes.grid(axis="x", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        said = "; ".join(f"{labels.get(name, name)} {score:.3f}{_said(interval)}" for name, score, interval in rows)
        return _svg(figure, f"Bar chart of {measure}: {said}.", prefix)


def _said(interval: Sequence[float] | None) -> str:
    return f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def training_curve(
    steps: Sequence[int],
    values: Sequence[float],
    title: str,
    system: str,
    prefix: str,
    marked: Sequence[int] = (),
) -> str:
    """One quantity over the steps: the measured values, faint, under their running mean.

    Args:
        steps: where it was measured, ascending.
        values: one per step, all finite.
        title: read out by screen readers, with the first and the last value.
        system: the line gets this system's colour.
        prefix: put before every id inside the picture, to keep ids unique in the page.
        marked: steps that get a tick along the bottom.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(350 / 72, 190 / 72))
        axes = figure.add_axes((46 / 350, 28 / 190, 1 - 58 / 350, 1 - 36 / 190))
        colour = _COLOUR[system_variable(system)]
        thin_steps, thin_values = _thinned(steps, values)
        many = len(thin_values) > 8
        marker = "" if many else "o"
        axes.plot(thin_steps, thin_values, color=colour, linewidth=1, alpha=0.35 if many else 1, marker=marker)
        if many:
            axes.plot(thin_steps, _running_mean(thin_values), color=colour, linewidth=2.2)
        first, last = min([*steps, *marked]), max([*steps, *marked])
        beside = 0.02 * (last - first) or 1
        axes.set_xlim(first - beside, last + beside)
        _dress(axes, first, last, thin_values)
        said = f"{title}: from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}."
        if marked:
            _tick_along_the_bottom(axes, marked, (last - first) / 100)
            said += f" Skipped steps marked: {len(marked)}."
        return _svg(figure, said, prefix)


@dataclass(frozen=True)
class Line:
    """A quantity that is measured now and then, labelled at the end of its line."""

    steps: Sequence[int]
    """Where it was measured, ascending; lines of one picture need not share their steps."""

    values: Sequence[float]
    """One per step, all finite."""

    name: str
    """Read out by screen readers."""

    label: str = ""
    """Drawn at the line's end, before its last value."""

    emphasis: int = 0
    """0 for the line that the picture is about; 1 and 2 for the lines it is compared with."""


def measured_lines(
    lines: Sequence[Line], title: str, size: tuple[int, int], label_width: int, prefix: str, system: str = "learn"
) -> str:
    """Lines through the measured values, unsmoothed, each labelled at its end.

    Args:
        lines: at least one, each with at least one point.
        title: read out by screen readers, before each line's name and values.
        size: drawn width and height, in CSS pixels.
        label_width: room for the labels, right of the lines, in CSS pixels.
        prefix: put before every id inside the picture, to keep ids unique in the page.
        system: the main line gets this system's colour.
    """
    width, height = size
    left, bottom, top = 46, 28, 10
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        plot = (width - left - label_width, height - bottom - top)
        axes = figure.add_axes((left / width, bottom / height, plot[0] / width, plot[1] / height))
        first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
        # a single point is drawn next to its label
        axes.set_xlim(first if first < last else first - 1, last)
        drawn = [_thinned_between_its_ends(line) for line in lines]
        _dress(axes, first, last, [value for _, values in drawn for value in values])
        for line, (steps, values) in zip(lines, drawn, strict=True):
            other_colour, thickness, dashes = _EMPHASIS[line.emphasis]
            colour = other_colour or _COLOUR[system_variable(system)]
            marker = "o" if len(values) <= _MOST_DOTS else ""
            (drawn_line,) = axes.plot(steps, values, color=colour, linewidth=thickness, linestyle=dashes, clip_on=False)
            drawn_line.set(marker=marker, markersize=3.5 if line.emphasis else 6)
            if steps[-1] < last:
                # connects a line that ends early with its label
                axes.plot([steps[-1], last], [values[-1]] * 2, color=_MUTED, linewidth=0.8, alpha=0.5)
        low, high = axes.get_ylim()
        pixel = (high - low) / plot[1]
        beside = axes.get_yaxis_transform()
        ends = [line.values[-1] for line in lines]
        for line, end, place in zip(lines, ends, _apart(ends, 16 * pixel, low + 8 * pixel, high), strict=True):
            if abs(place - end) > 2 * pixel:
                reach = [1 + pixels / plot[0] for pixels in (3, 11)]
                axes.plot(reach, [end, place], color=_MUTED, linewidth=0.8, transform=beside, clip_on=False)
            axes.text(
                1 + 14 / plot[0],
                place,
                f"{line.label} {shown(end)}".strip(),
                transform=beside,
                va="center_baseline",
                fontweight="normal" if line.emphasis else "bold",
                color=_MUTED if line.emphasis else _INK,
            )
        said = "; ".join(f"{line.name} from {shown(line.values[0])} to {shown(line.values[-1])}" for line in lines)
        return _svg(figure, f"{title}, from step {first} to step {last}: {said}.", prefix)


_EMPHASIS: Any = (  # colour (None: the system's), thickness, dashes, so that the lines differ without colour too
    (None, 2.4, "-"),
    (_INK, 1.5, (0, (4, 2))),
    (_MUTED, 1.5, (0, (1.2, 1.6))),
)
_MOST_DOTS = 12
_RUN_AWAY = 1e7


def shown(value: float) -> str:
    """A value with about three digits, in scientific notation only if it is huge, like a perplexity that diverged."""
    size = abs(value)
    if size >= _RUN_AWAY:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _dress(axes: Axes, first: int, last: int, values: Sequence[float]) -> None:
    """Sparse ticks at whole steps; a flat line stays flat, whereas matplotlib would magnify its noise."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    lacking = max(0.0, 0.04 * size - (high - low)) or (0.1 if size == 0 else 0.0)
    room = 0.08 * (high - low) + lacking / 2
    axes.set_ylim(low - room, high + room)
    axes.locator_params(axis="y", nbins=5)
    if first == last:
        axes.set_xticks([first])
    else:
        width = 72 * axes.get_window_extent().width / axes.figure.dpi
        axes.locator_params(axis="x", nbins=min(5, int(width / 50)), integer=True)
    axes.ticklabel_format(axis="y", style="plain")
    if size >= 1000:
        form = ".0e" if size >= _RUN_AWAY else ",.0f"
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _tick_along_the_bottom(axes: Axes, steps: Sequence[int], apart: float) -> None:
    """One path for all ticks, without those too close to tell apart, so that many ticks add little to the page."""
    xs: list[float] = []
    ys: list[float] = []
    for step in steps:
        if not xs or step - xs[-2] >= apart:
            xs += [step, step, math.nan]
            ys += [0, 0.07, math.nan]
    axes.plot(xs, ys, color=_WARN, linewidth=1.4, transform=axes.get_xaxis_transform(), clip_on=False)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones and in the same order, at least `gap` apart, between low and high."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for _ in range(50):
        for below, above in pairwise(order):
            push = max(0.0, gap - (places[above] - places[below])) / 2
            places[below] -= push
            places[above] += push
    for i in order:
        places[i] = max(places[i], low)
        low = places[i] + gap
    for i in reversed(order):
        places[i] = min(places[i], high)
        high = places[i] - gap
    return places


def _thinned_between_its_ends(line: Line) -> tuple[list[float], list[float]]:
    """Keep the ends as measured, because a label and a sentence show their values."""
    if len(line.values) <= _MOST_POINTS:
        return list(line.steps), list(line.values)
    steps, values = _thinned(line.steps[1:-1], line.values[1:-1])
    return [line.steps[0], *steps, line.steps[-1]], [line.values[0], *values, line.values[-1]]


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over runs of steps, so that a long training doesn't make a heavy page."""
    size = math.ceil(len(values) / _MOST_POINTS)
    starts = range(0, len(values), size)
    return [_mean(steps[i : i + size]) for i in starts], [_mean(values[i : i + size]) for i in starts]


def _running_mean(values: Sequence[float]) -> list[float]:
    reach = max(1, len(values) // 24)
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _svg(figure: Figure, description: str, prefix: str) -> str:
    """The figure as an inline `<svg>`: no prolog, no metadata, no external address, colours as CSS variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    # a hundredth of a pixel is precise enough, and halves the size of the curves
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's own font
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
