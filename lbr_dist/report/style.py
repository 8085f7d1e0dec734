"""The style of the report's page: a light and a dark palette, with one colour per system."""

from __future__ import annotations

from html import escape

from lbr_dist.report.charts import system_variable

STYLE = """
:root { color-scheme: light dark;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: ui-serif, "Iowan Old Style", Charter, Georgia, "Times New Roman", serif;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1e2329; --muted: #5d6670; --rule: #e2dfd9;
  --bm25: #7b8794; --base: #b9853b; --learn: #2b8a87; --lbr: #3f51b5; --other: #8a6d8f; --good: #1f6f43;
  --warn: #a33b12; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181c; --card: #1c2026; --ink: #e8e6e1; --muted: #a0a8b1; --rule: #323840;
  --bm25: #8f9ba8; --base: #d3a25c; --learn: #4fb3ae; --lbr: #8c9cf5; --other: #b797bd; --good: #7fcf9f;
  --warn: #f0a07a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 60rem; padding: 3.5rem 1.5rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 var(--sans); overflow-wrap: anywhere; }
h1, h2, h3, h4, p, ul, ol, dl, figure { margin: 0; }
h1 { font: 600 clamp(2rem, 6vw, 3rem)/1.1 var(--serif); letter-spacing: -.015em; }
h2 { font: 600 1.5rem/1.25 var(--serif); margin-bottom: 1.25rem; }
h3 { font-size: 1.05rem; line-height: 1.45; font-weight: 600; }
h4 { font-size: .85rem; line-height: 1.35; font-weight: 600; margin-bottom: .6rem; }
header { padding-bottom: 2.5rem; }
.kicker { font-size: .85rem; color: var(--muted); margin-bottom: .75rem; }
.lead { font: 1.3rem/1.5 var(--serif); max-width: 42rem; margin-top: 1.1rem; }
.lead strong { color: var(--lbr); }
section, footer { border-top: 1px solid var(--rule); padding: 2.25rem 0 2.5rem; }
section > h3 { margin: 2rem 0 .5rem; }
section > ul { padding-left: 1.1rem; }
section > ul li { margin: .3rem 0; }
.quiet, figcaption, caption, small, .score, footer { color: var(--muted); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
svg text { font-family: var(--sans) !important; font-variant-numeric: tabular-nums; }
.narrow { display: none; }
table { margin-top: 1.75rem; border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .6rem; }
th, td { text-align: right; padding: .55rem .35rem .55rem .9rem; border-top: 1px solid var(--rule);
  vertical-align: top; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; }
thead th { border: 0; font-size: .85rem; color: var(--muted); white-space: nowrap; }
td small { display: block; white-space: nowrap; font-size: .75rem; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; background: var(--c);
  margin-right: .5em; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 2rem 2.25rem; }
.curves figcaption { margin-bottom: .5rem; color: var(--ink); }
.curves + .quiet { margin-top: 1.25rem; }
.skips, .finding { margin-top: 1rem; max-width: 42rem; }
.finding + figure, .warning + figure, figure + .curves { margin-top: 1.5rem; }
.finding + figure figcaption, .warning + figure figcaption { margin-bottom: .5rem; color: var(--ink); }
.warning { margin-top: 1rem; padding-left: .9rem; border-left: 3px solid var(--warn); max-width: 42rem; }
.warning strong { color: var(--warn); }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.25rem;
  margin-top: 1.25rem; }
.tag { font-weight: 400; color: var(--muted); margin-right: .35em; }
details { margin-top: .6rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--muted); width: fit-content; }
summary:focus-visible { outline: 2px solid var(--lbr); outline-offset: 3px; }
details ul { padding: .4rem 0 0 1.1rem; }
.systems { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr)); gap: 1.25rem;
  margin-top: 1.1rem; }
.systems > div { border-top: 3px solid var(--c); padding-top: .7rem; font-size: .85rem; line-height: 1.5; }
.systems ol { padding-left: 1.3rem; }
.systems li { margin-bottom: .8rem; padding-left: .15rem; }
.systems li::marker { color: var(--muted); font-variant-numeric: tabular-nums; }
.miss { color: var(--muted); }
.meta { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; min-height: 1.5em; }
.meta .score { font-size: .75rem; }
.mark { color: var(--good); font-weight: 600; white-space: nowrap; }
footer h2 { font: 600 .95rem var(--sans); color: var(--ink); margin-bottom: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem 1.5rem;
  margin-bottom: 1.75rem; }
dd { margin: 0; color: var(--ink); font-size: 1rem; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) {
  body { padding: 2rem 1.1rem; }
  .wide { display: none; } .narrow { display: block; }
  .lead { font-size: 1.15rem; }
  table, caption, thead, tbody { display: block; }
  tr { display: grid; grid-template-columns: repeat(4, 1fr); border-top: 1px solid var(--rule); padding: .5rem 0; }
  tr > :first-child { grid-column: 1 / -1; }
  th, td { border: 0; padding: .1rem 0; text-align: left; font-size: .9rem; } td small { font-size: .68rem; }
  thead tr { border: 0; padding: 0; } thead th { font-size: .75rem; } thead th:first-child { display: none; }
  article { padding: 1rem; } }
@media print { body { max-width: none; padding: 0; } article, figure { break-inside: avoid; } }
"""


def as_text(value: object) -> str:
    """The value as escaped text for the page."""
    return escape(str(value), quote=True)


def dot(system: str) -> str:
    """A dot in the system's colour."""
    return f'<span class="dot" style="--c:var({system_variable(system)})" aria-hidden="true"></span>'
