"""The report's charts, drawn by matplotlib and returned as SVG to stand inside the page.

Colours are drawn as stand-ins and leave as CSS variables, so that one picture suits a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

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
}
_COLOUR = {variable: stand_in for stand_in, variable in _STAND_INS.items()}
_INK, _MUTED, _RULE = (_COLOUR[name] for name in ("--ink", "--muted", "--rule"))

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
    """Horizontal bars of one measure between 0 and 1, with `MEASURE_interval` where it is given.

    Args:
        systems: system -> its scores; systems without the measure are left out.
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


def training_curve(steps: Sequence[int], values: Sequence[float], title: str, system: str, prefix: str) -> str:
    """One quantity over the steps: what was measured, faint, under its running mean."""
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
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.margins(x=0.02, y=0.08)
        said = f"{title}: from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}."
        return _svg(figure, said, prefix)


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
    """The figure as an inline `<svg>`: no prolog, no metadata, no outside address, colours as CSS variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's own font
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
