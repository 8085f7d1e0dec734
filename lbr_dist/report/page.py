"""The report of a run: one self-contained page, for people who did not train the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbr_dist.console import gib
from lbr_dist.evaluation.systems import LABELS, SHORT_LABELS
from lbr_dist.report.charts import score_bars, system_variable
from lbr_dist.report.style import STYLE, as_text, dot
from lbr_dist.report.training import training_section
from lbr_dist.storage.files import write_atomic

_MEASURES = {"ndcg@10": "nDCG@10", "recall@10": "Recall@10", "recall@100": "Recall@100", "mrr@10": "MRR@10"}
_LONGEST_TEXT = 240
_NOTE = (
    "An implementation of the design of Learn Before Represent (arXiv 2601.11124), "
    "not a reproduction of its configuration."
)


def write_report(run_dir: Path, metrics: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> Path:
    """Write `report/index.html` in the run folder: inline style, inline SVG, no external resources, no script.

    Args:
        run_dir: the run folder; `learn/metrics.jsonl` and `represent/metrics.jsonl` are read if they exist.
        metrics: the content of `report/metrics.json`. Any part may be missing; the page then leaves out what shows it.
        examples: `{"query", "positives": [text], "systems": {name: [{"text", "relevant", "score"}]}}`, one per query.

    Returns:
        The path of the page.
    """
    systems = _in_order(metrics.get("systems") or {})
    domain = str(metrics.get("domain") or "Unnamed domain")
    sections = (
        _scores_section(systems, metrics.get("comparisons") or []),
        training_section(run_dir),
        _examples_section(examples),
    )
    body = f"""<header><p class="kicker">Learn Before Represent &middot; retrieval report</p>
<h1>{as_text(domain)}</h1>
<p class="lead">{_headline(systems, metrics.get("num_queries"))}</p></header>
<main>{"".join(sections)}</main>
<footer>{_settings(metrics)}<p>{as_text(_NOTE)}</p></footer>"""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{as_text(domain)} &middot; retrieval report</title>
<style>{STYLE}</style></head>
<body>{body}</body></html>
"""
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page)
    return path


def _in_order(systems: Mapping[str, Any]) -> dict[str, Any]:
    """The known systems in the order of `LABELS`, then any others."""
    return {name: systems[name] for name in [*LABELS, *systems] if name in systems}


def _label(system: str) -> str:
    return as_text(LABELS.get(system, system))


def _short(system: str) -> str:
    return as_text(SHORT_LABELS.get(system, system))


def _percent(share: float) -> str:
    rounded = f"{100 * share:.0f}"
    # 99.6 % must not be shown as 100 %, nor 0.3 % as 0 %
    if (rounded == "100" and share < 1) or (rounded == "0" and share > 0):
        rounded = f"{100 * share:.1f}"
    return f"{rounded}&nbsp;%"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else as_text(value)


def _headline(systems: Mapping[str, Any], num_queries: object) -> str:
    """The main result in one plain sentence; recall is a share, however many relevant documents a query has."""
    shares = {n: scores["recall@10"] for n, scores in systems.items() if scores.get("recall@10") is not None}
    if not shares:
        return "No system was scored."
    first = "lbr" if "lbr" in shares else next(iter(shares))
    over = f", on average over {_number(num_queries)} held-out queries" if num_queries is not None else ""
    others = [f"{_short(n)} finds {_percent(shares[n])}" for n in ("bm25", "base") if n in shares and n != first]
    rest = f"; {', '.join(others)}" if others else ""
    name = _short(first)
    return (
        f"{name[0].upper()}{name[1:]} finds <strong>{_percent(shares[first])}</strong> of the relevant documents "
        f"in its top ten results{over}{rest}."
    )


# ---- scores ---------------------------------------------------------------------------------------------------


def _scores_section(systems: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> str:
    if not systems:
        return ""
    chart = ""
    if any(scores.get("ndcg@10") is not None for scores in systems.values()):
        wide, narrow = (score_bars(systems, LABELS, "ndcg@10", width, f"bars{width}") for width in (760, 340))
        chart = (
            f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div><figcaption>nDCG@10: 1 is a '
            "perfect top ten. Thin lines are 95&nbsp;% bootstrap intervals over the queries.</figcaption></figure>"
        )
    return f"<section><h2>How well each system ranks</h2>{chart}{_table(systems)}{_comparisons(comparisons)}</section>"


def _table(systems: Mapping[str, Any]) -> str:
    best = {m: max((s[m] for s in systems.values() if s.get(m) is not None), default=None) for m in _MEASURES}
    head = "".join(f'<th scope="col" role="columnheader">{label}</th>' for label in _MEASURES.values())
    rows = []
    for name, scores in systems.items():
        cells = []
        for measure in _MEASURES:
            value, interval = scores.get(measure), scores.get(f"{measure}_interval")
            if value is None:
                cells.append('<td role="cell">&ndash;</td>')
                continue
            shown = f"<b>{value:.3f}</b>" if value == best[measure] else f"{value:.3f}"
            small = f"<small>{interval[0]:.3f}&ndash;{interval[1]:.3f}</small>" if interval else ""
            cells.append(f'<td role="cell">{shown}{small}</td>')
        header = f'<th scope="row" role="rowheader">{dot(name)}{_label(name)}</th>'
        rows.append(f'<tr role="row">{header}{"".join(cells)}</tr>')
    # the roles repeat the tags: on a phone the rows are grids, and browsers then ignore the tags' roles
    return (
        '<table role="table"><caption>All metrics with their 95&nbsp;% intervals; the best of each column is bold.'
        '</caption><thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">System</th>'
        f'{head}</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _comparisons(comparisons: Iterable[Mapping[str, Any]]) -> str:
    items = []
    for pair in comparisons:
        difference, interval = pair.get("ndcg@10_difference"), pair.get("interval")
        if difference is None or not interval:
            continue
        a, b = _short(str(pair.get("a"))), _short(str(pair.get("b")))
        low, high = interval
        numbers = f"95&nbsp;% interval of the difference {_signed(low)} to {_signed(high)}"
        if low <= 0 <= high:
            sentence = (
                f"{a} and {b} cannot be told apart on these queries (difference {_signed(difference)}; {numbers})."
            )
        else:
            side = "above" if difference > 0 else "below"
            sentence = f"{a} is <strong>{abs(difference):.3f}</strong> {side} {b} ({numbers})."
        items.append(f"<li>{sentence[0].upper()}{sentence[1:]}</li>")
    if not items:
        return ""
    return f"<h3>Paired differences in nDCG@10</h3><ul>{''.join(items)}</ul>"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "&minus;")


# ---- examples and settings ------------------------------------------------------------------------------------


def _examples_section(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    cards = []
    for example in examples:
        positives = "".join(f"<li {_DIR}>{_cut(text)}</li>" for text in example.get("positives") or [])
        wanted = f"<details><summary>Relevant documents</summary><ul>{positives}</ul></details>" if positives else ""
        columns = "".join(_hits(name, hits) for name, hits in _in_order(example.get("systems") or {}).items())
        query = f'<h3 {_DIR}><span class="tag">Query</span> {_cut(example.get("query", ""))}</h3>'
        cards.append(f'<article>{query}{wanted}<div class="systems">{columns}</div></article>')
    return (
        "<section><h2>What the systems return</h2><p>The top three results of each system for a few held-out "
        f'queries. <span class="mark">&#10003; Relevant</span> marks a document that answers the query.</p>'
        f"{''.join(cards)}</section>"
    )


_DIR = 'dir="auto"'  # texts may be in left-to-right or right-to-left scripts


def _hits(system: str, hits: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for hit in hits:
        relevant = bool(hit.get("relevant"))
        mark = '<span class="mark">&#10003; Relevant</span>' if relevant else ""
        score = hit.get("score")
        shown = f'<span class="score">score {score:.3g}</span>' if score is not None and math.isfinite(score) else ""
        items.append(
            f'<li class="{"hit" if relevant else "miss"}"><p class="meta">{mark}{shown}</p>'
            f"<p {_DIR}>{_cut(hit.get('text', ''))}</p></li>"
        )
    found = f"<ol>{''.join(items)}</ol>" if items else '<p class="quiet">Found nothing.</p>'
    return f'<div style="--c:var({system_variable(system)})"><h4>{dot(system)}{_label(system)}</h4>{found}</div>'


def _cut(text: object) -> str:
    whole = str(text)
    return as_text(whole if len(whole) <= _LONGEST_TEXT else whole[:_LONGEST_TEXT].rstrip() + " …")


def _settings(metrics: Mapping[str, Any]) -> str:
    rows = {
        "Queries": metrics.get("num_queries"),
        "Documents searched": metrics.get("num_documents"),
        "Ranks": metrics.get("world_size"),
        "ZeRO stage": metrics.get("zero_stage"),
        "Time": _duration(metrics.get("seconds")),
        "Peak memory of a rank's process": _gibibytes(metrics.get("peak_memory_bytes")),
    }
    items = "".join(f"<div><dt>{as_text(k)}</dt><dd>{_number(v)}</dd></div>" for k, v in rows.items() if v is not None)
    return f"<h2>Settings</h2><dl>{items}</dl>" if items else ""


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _gibibytes(size: float | None) -> str | None:
    return None if size is None else gib(size)
