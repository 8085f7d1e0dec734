"""The report's page: complete, escaped, self-contained, and written even if parts of a run are missing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.report.page import LABELS, write_report
from tests.unit.report.cases import METRICS, Page, scores

HOSTILE = "<script>alert(1)</script> \"'& <img src=x onerror=alert(2)> $x_1$ ü"


EXAMPLES: list[dict[str, Any]] = [
    {
        "query": "Which one?",
        "positives": ["this one"],
        "systems": {
            "lbr": [
                {"text": "this one", "relevant": True, "score": 0.9},
                {"text": "no", "relevant": False, "score": 0.5},
            ],
            "bm25": [],
        },
    }
]


def with_curves(run_dir: Path) -> None:
    for stage, keys in (("learn", ("loss", "target_loss", "text_loss")), ("represent", ("loss", "accuracy"))):
        (run_dir / stage).mkdir(parents=True)
        lines = [json.dumps({"step": step, **dict.fromkeys(keys, 3 / step + step % 7)}) for step in range(1, 3001)]
        (run_dir / stage / "metrics.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("run")
    with_curves(run_dir)
    path = write_report(run_dir, METRICS, EXAMPLES)
    assert path == run_dir / "report" / "index.html"
    return path.read_text(encoding="utf-8")


def test_the_headline_states_the_result_in_one_sentence(html: str) -> None:
    text = Page(html).text.replace("\xa0", " ")
    assert (
        "LBR finds 84 % of the relevant documents in its top ten results, on average over 250 held-out queries; "
        "BM25 finds 66 %, the untouched base model finds 19 %."
    ) in text
    assert "arXiv 2601.11124), not a reproduction of its configuration." in text


def test_systems_come_in_order_with_their_numbers(html: str) -> None:
    page = Page(html)
    table = page.text[page.text.index("All metrics") :]
    places = [table.index(label) for label in LABELS.values()]
    assert places == sorted(places)
    assert "0.7000.650\N{EN DASH}0.750" in table  # lbr's nDCG, with its interval below
    assert "<b>0.700</b>" in html and "<b>0.520</b>" not in html
    for label in page.labels()[:2]:
        assert "BM25 0.520, 95 % interval 0.470 to 0.570" in label and "LBR: learn, then represent 0.700" in label


def test_differences_are_described_in_words(html: str) -> None:
    text = Page(html).text.replace("\xa0", " ")
    assert "LBR is 0.180 above BM25 (95 % interval of the difference +0.100 to +0.250)." in text
    minus = "\N{MINUS SIGN}"
    interval = f"(95 % interval of the difference {minus}0.200 to {minus}0.050)"
    assert f"The model after learn alone is 0.110 below BM25 {interval}." in text
    assert "The model after learn alone and the untouched base model cannot be told apart" in text


def test_curves_settings_and_hits_are_shown(html: str) -> None:
    page = Page(html)
    labels = page.labels()
    assert len(labels) == 6 and all(svg["role"] == "img" for svg in page.all("svg"))
    assert labels[2] == "Learn: loss on the target, through the bottleneck: from 4 at step 1 to 4 at step 3000."
    for expected in ("1 h 30 min", "3.0 GiB", "12,345", "ZeRO stage", "Found nothing."):
        assert expected in page.text
    # relevance is shown as a word; the second one is the legend
    assert page.text.count("✓ Relevant") == 2


def test_a_long_training_gives_a_small_page(html: str) -> None:
    assert len(html) < 100_000
    assert not re.search(r' d="[^"]*\.\d\d\d', html)


def test_nothing_is_loaded_from_outside_and_ids_are_unique(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "data", "srcset"):
                assert value.startswith("#")
    assert "://" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', html)) <= set(ids)


def test_colours_are_the_pages_variables_and_all_are_defined(html: str) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert not re.search(r"#0\d0\d0\d\b", svgs), "a stand-in colour was left in a chart"
    assert {"var(--bm25)", "var(--base)", "var(--learn)", "var(--lbr)"} <= set(re.findall(r"var\(--\w+\)", svgs))
    assert set(re.findall(r"var\((--[a-z]\w*)\)", html)) - {"--c"} <= set(re.findall(r"(--\w+):", html))
    assert "prefers-color-scheme: dark" in html


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["domain"] = HOSTILE
    metrics["world_size"] = HOSTILE
    metrics["systems"][HOSTILE] = scores(0.3, 0.3)
    metrics["comparisons"][0]["a"] = HOSTILE
    hit = {"text": HOSTILE, "relevant": False, "score": float("-inf")}
    examples = [{"query": HOSTILE, "positives": [HOSTILE], "systems": {"lbr": [hit], HOSTILE: [hit]}}]
    html = write_report(tmp_path, metrics, examples).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) == 12  # every place that shows a text, including both charts
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "inf" not in page.text.split()


def test_a_page_without_curves_examples_or_most_systems(tmp_path: Path) -> None:
    metrics = {"domain": "Code", "systems": {"bm25": {"ndcg@10": 0.5, "recall@10": 0.996}, "lbr": {"mrr@10": 0.2}}}
    page = Page(write_report(tmp_path, metrics, []).read_text(encoding="utf-8"))
    text = page.text.replace("\xa0", " ")
    assert "BM25 finds 99.6 % of the relevant documents in its top ten results." in text
    assert len(page.labels()) == 2 and "How training went" not in text and "What the systems return" not in text
    assert "Settings" not in text and "\N{EN DASH}" in text


def test_an_empty_report_is_still_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))
    assert "No system was scored." in page.text and page.all("title") and page.all("meta")
