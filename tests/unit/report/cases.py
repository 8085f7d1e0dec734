"""The report's page as a reader gets it, and metrics to make it from."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lbr_dist.report.page import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The page as a reader gets it: balanced tags, their attributes, the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "tags left open"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def labels(self) -> list[str]:
        return [svg["aria-label"] for svg in self.all("svg")]


def scores(ndcg: float, recall: float) -> dict[str, Any]:
    values = {"ndcg@10": ndcg, "recall@10": recall, "recall@100": 0.9, "mrr@10": 0.4}
    return values | {f"{name}_interval": [value - 0.05, value + 0.05] for name, value in values.items()}


METRICS: dict[str, Any] = {
    "domain": "Chemistry",
    "world_size": 4,
    "zero_stage": 3,
    "seconds": 5400.0,
    "peak_memory_bytes": 3 * 2**30,
    "num_queries": 250,
    "num_documents": 12345,
    # not in the page's order
    "systems": {
        "lbr": scores(0.7, 0.84),
        "learn": scores(0.41, 0.5),
        "base": scores(0.1, 0.19),
        "bm25": scores(0.52, 0.66),
    },
    "comparisons": [
        {"a": "lbr", "b": "bm25", "ndcg@10_difference": 0.18, "interval": [0.1, 0.25]},
        {"a": "learn", "b": "bm25", "ndcg@10_difference": -0.11, "interval": [-0.2, -0.05]},
        {"a": "learn", "b": "base", "ndcg@10_difference": 0.01, "interval": [-0.02, 0.04]},
    ],
}


def learn_page(tmp_path: Path, entries: list[dict[str, Any]]) -> Page:
    (tmp_path / "learn").mkdir()
    (tmp_path / "learn" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))


def heldout(step: int, own: float | None, shuffled: float | None, without: float | None = None) -> dict[str, Any]:
    names = ("", "_shuffled", "_without")
    values = {f"heldout_target_loss{name}": v for name, v in zip(names, (own, shuffled, without), strict=True)}
    return {"step": step, **{name: value for name, value in values.items() if value is not None}}
