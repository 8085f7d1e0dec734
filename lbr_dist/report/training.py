"""The report's section on training: the curves of both stages, and how much information the bottleneck carries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbr_dist.report.charts import Line, measured_lines, shown, training_curve
from lbr_dist.report.style import as_text, dot

_CURVES = (  # stage, key in metrics.jsonl, title, system whose colour is used
    ("learn", "target_loss", "Learn: loss on the target, through the bottleneck", "learn"),
    ("learn", "text_loss", "Learn: loss on the text itself", "learn"),
    ("represent", "loss", "Represent: contrastive loss", "lbr"),
    ("represent", "accuracy", "Represent: accuracy within the batch", "lbr"),
    ("represent", "alignment", "Represent: squared distance between a query and its document", "lbr"),
    ("represent", "uniformity", "Represent: uniformity of the documents; lower is more spread out", "lbr"),
)
_ON_DEV = {  # key in represent's metrics.jsonl: title, key, name and label of each line; drawn after the key's curve
    "loss": (
        "Represent: contrastive loss of the development pairs",
        (("heldout_loss", "mean over the queries", ""),),
    ),
    "accuracy": (
        "Represent: how the development pairs are ranked",
        (
            ("heldout_accuracy", "share of queries whose document is ranked first", "first"),
            ("heldout_mrr", "mean reciprocal rank at 10", "MRR"),
        ),
    ),
}
_TARGET_LOSSES = (  # key in learn's metrics.jsonl, name for screen readers, label at the line's end, short label
    ("heldout_target_loss", "with its own bottleneck", "own bottleneck", "own"),
    ("heldout_target_loss_shuffled", "with another text's bottleneck", "another text's", "another's"),
    ("heldout_target_loss_without", "without a bottleneck", "no bottleneck", "none"),
)
# nats per token; below this, another text's bottleneck is as good, so the text's own carries no information
IGNORED_BELOW = 0.02
_MOST_SKIPS_NAMED = 5

_Entry = Mapping[str, Any]
_Points = tuple[list[int], list[float]]


def training_section(run_dir: Path) -> str:
    """Curves of both stages and learn's held-out diagnostics, as far as metrics.jsonl has them; "" if it has none."""
    logs = {stage: _entries(run_dir / stage / "metrics.jsonl") for stage in ("learn", "represent")}
    skipped = {stage: _skipped(entries) for stage, entries in logs.items()}
    figures = []
    for number, (stage, key, title, system) in enumerate(_CURVES):
        # a skipped step changed no weight, and its spike would flatten the rest of the curve
        steps, values = _points(logs[stage], key, but=skipped[stage])
        if steps:
            chart = training_curve(steps, values, title, system, f"curve{number}", skipped[stage])
            figures.append(f"<figure><figcaption>{dot(system)}{as_text(title)}</figcaption>{chart}</figure>")
        if stage == "represent" and key in _ON_DEV:
            figures += _on_dev(logs[stage], key)
    curves = ""
    if figures:
        measured = any(_points(logs["represent"], measure)[0] for _, lines in _ON_DEV.values() for measure, *_ in lines)
        on_dev = " Curves of the development pairs are not smoothed." if measured else ""
        curves = (
            f'<div class="curves">{"".join(figures)}</div>'
            f'<p class="quiet">The x axis shows optimizer steps. Faint: as measured. Strong: running mean.{on_dev}</p>'
        )
    parts = [curves, *(_skips(stage, steps) for stage, steps in skipped.items()), _bottleneck(logs["learn"])]
    return f"<section><h2>How training went</h2>{''.join(parts)}</section>" if any(parts) else ""


def _entries(path: Path) -> list[_Entry]:
    """The lines that are an object with a step; a killed run may leave a broken line."""
    entries: list[_Entry] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return entries


def _number(entry: _Entry, key: str) -> float | None:
    try:
        value = float(entry[key])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _points(entries: Sequence[_Entry], key: str, but: Sequence[int] = ()) -> _Points:
    """Steps and values of the entries that have a finite value."""
    left_out = set(but)
    pairs = [(entry["step"], _number(entry, key)) for entry in entries if entry["step"] not in left_out]
    points = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in points], [value for _, value in points]


# ---- skipped steps --------------------------------------------------------------------------------------------


def _skipped(entries: Sequence[_Entry]) -> list[int]:
    return sorted({entry["step"] for entry in entries if _number(entry, "skipped")})


def _skips(stage: str, steps: Sequence[int]) -> str:
    if not steps:
        return ""
    named = [f"{step:,}" for step in steps[:_MOST_SKIPS_NAMED]]
    if len(steps) > _MOST_SKIPS_NAMED:
        named.append(f"{len(steps) - _MOST_SKIPS_NAMED:,} more")
    which = f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else f"step {named[0]}"
    one = len(steps) == 1
    what = f"1 step of {stage} was" if one else f"{len(steps):,} steps of {stage} were"
    why = f"because {'its' if one else 'their'} loss or gradient was not finite or jumped"
    leave = "The curves leave it out and mark it" if one else "The curves leave them out and mark them"
    return f'<p class="skips">{what} skipped, {why}: {which}. {leave} along the bottom.</p>'


# ---- development pairs ----------------------------------------------------------------------------------------


def _on_dev(entries: Sequence[_Entry], key: str) -> list[str]:
    """The figure after a key's curve, if the development pairs were measured."""
    title, measures = _ON_DEV[key]
    lines = []
    for emphasis, (measure, name, label) in enumerate(measures):
        steps, values = _points(entries, measure)
        if steps:
            lines.append(Line(steps, values, name, label, emphasis))
    if not lines:
        return []
    chart = measured_lines(lines, title, (350, 190), 78, f"dev-{key}", "lbr")
    below = ""
    if key == "loss":
        best, step = min(zip(lines[0].values, lines[0].steps, strict=True))
        below = f'<p class="quiet">Lowest at step {step:,}: {shown(best)}.</p>'
    return [f"<figure><figcaption>{dot('lbr')}{as_text(title)}</figcaption>{chart}{below}</figure>"]


# ---- held-out diagnostics -------------------------------------------------------------------------------------


def _bottleneck(entries: Sequence[_Entry]) -> str:
    parts = []
    if any(_points(entries, key)[0] for key, *_ in _TARGET_LOSSES):
        title = "Held-out loss on the target, in nats per token"
        wide = measured_lines(_loss_lines(entries, short=False), title, (760, 260), 160, "heldout760")
        narrow = measured_lines(_loss_lines(entries, short=True), title, (340, 220), 112, "heldout340")
        parts.append(
            f"{_finding(entries)}<figure><figcaption>{dot('learn')}Learn: held-out loss on the target, in nats per "
            f'token</figcaption><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
        )
    small = _perplexity(entries) + _effective_rank(entries)
    if small:
        parts.append(f'<div class="curves">{small}</div>')
    return f"<h3>On held-out texts</h3>{''.join(parts)}" if parts else ""


def _loss_lines(entries: Sequence[_Entry], short: bool) -> list[Line]:
    lines = []
    for emphasis, (key, name, label, short_label) in enumerate(_TARGET_LOSSES):
        steps, values = _points(entries, key)
        if steps:
            lines.append(Line(steps, values, name, short_label if short else label, emphasis))
    return lines


def _finding(entries: Sequence[_Entry]) -> str:
    """What the target's losses show, in a sentence; with a warning if the bottleneck is ignored."""
    keys = [key for key, *_ in _TARGET_LOSSES]
    measured = [(entry["step"], [_number(entry, key) for key in keys]) for entry in entries]
    # the text's own and another's, measured together: comparing different steps says nothing about the bottleneck
    compared = [(step, values) for step, values in measured if values[0] is not None and values[1] is not None]
    alone = [(step, values) for step, values in measured if values[0] is not None]
    if not alone:
        return ""
    step, (own, shuffled, without) = (compared or alone)[-1]
    assert own is not None
    if step == 0 and not any(key in entry for entry in entries if entry["step"] for key in keys):
        when = "Before the first step,"
    elif step == max(entry["step"] for entry in entries):
        when = "At the end of learn,"
    else:
        when = f"At step {step:,}, the last step with these measurements,"
    start = f'<p class="finding">{when} the loss on the target is'
    if shuffled is None:
        return f"{start} {own:.2f} nats per token with its own bottleneck.</p>"
    gap = shuffled - own
    digits = 2 if abs(gap) >= 0.1 else 3
    # the difference of the rounded values, so that a reader who subtracts gets the same
    carried = round(shuffled, digits) - round(own, digits)
    losses = f"{own:.{digits}f} nats per token with its own bottleneck, {shuffled:.{digits}f} with another text's"
    if without is not None:
        losses = f"{losses} and {without:.{digits}f} without any"
    if gap >= IGNORED_BELOW:
        return f"{start} {losses}: the bottleneck carries <strong>{carried:.{digits}f} nats</strong> per token.</p>"
    sentence = f"{start} {losses}.</p>"
    if step == 0:
        return sentence
    return (
        f'{sentence}<p class="warning"><strong>The bottleneck is ignored:</strong> another text\'s works as well, so '
        "the vectors pooled from it say little about their text. Check <code>learn.targets</code> (if a target can be "
        "predicted without the text, the bottleneck has nothing to carry) and <code>learn.drop_target_tokens</code> "
        "(dropping more of them leaves more to carry), or train for more steps.</p>"
    )


def _perplexity(entries: Sequence[_Entry]) -> str:
    return _small(entries, "heldout_perplexity", "Learn: perplexity of held-out text, no bottleneck", "")


def _effective_rank(entries: Sequence[_Entry]) -> str:
    steps, values = _points(entries, "effective_rank")
    if not steps:
        return ""
    _, limits = _points(entries, "effective_rank_limit")
    most = f" of at most {limits[-1]:,.0f}" if limits else ""
    words = f"{shown(values[-1])}{most}: the vectors of different texts differ in about this many directions."
    return _small(entries, "effective_rank", "Learn: effective rank of the pooled vectors", words)


def _small(entries: Sequence[_Entry], key: str, title: str, words: str) -> str:
    steps, values = _points(entries, key)
    if not steps:
        return ""
    chart = measured_lines([Line(steps, values, key.replace("_", " "))], title, (350, 190), 62, key)
    below = f'<p class="quiet">{as_text(words)}</p>' if words else ""
    return f"<figure><figcaption>{dot('learn')}{as_text(title)}</figcaption>{chart}{below}</figure>"
