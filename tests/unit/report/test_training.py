"""The section on training: curves, learn's diagnostics, and skipped steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.report.charts import Line, _thinned_between_its_ends
from lbr_dist.report.page import write_report
from tests.unit.report.cases import METRICS, Page, heldout, learn_page


def test_broken_lines_and_missing_values_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "learn").mkdir()
    (tmp_path / "learn" / "metrics.jsonl").write_text(
        '{"step": 1, "target_loss": 4.0}\nnot json\n[1]\n{"target_loss": 9}\n{"step": 2, "target_loss": null}\n'
        '{"step": 3, "target_loss": NaN}\n{"step": 4, "target_loss": 2.0}\n{"step": 5, "target_loss": Infinity}\n'
        '{"step": Infinity, "target_loss": 1}\n{"step": 6, "targ'
    )
    (tmp_path / "represent").mkdir()
    (tmp_path / "represent" / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5}\n')
    labels = Page(write_report(tmp_path, METRICS, []).read_text(encoding="utf-8")).labels()
    assert labels[2:] == [
        "Learn: loss on the target, through the bottleneck: from 4 at step 1 to 2 at step 4.",
        "Represent: contrastive loss: from 1.5 at step 7 to 1.5 at step 7.",
    ]


def test_the_result_of_the_bottleneck_is_a_sentence_and_a_chart_in_both_widths(tmp_path: Path) -> None:
    entries = [heldout(0, 4.6, 4.61, 4.7), {"step": 1, "target_loss": 4.0}, heldout(2, 2.894, 3.556, 4.1)]
    page = learn_page(tmp_path, entries)
    assert (
        "At the end of learn, the loss on the target is 2.89 nats per token with its own bottleneck, 3.56 with another "
        "text's and 4.10 without any: the bottleneck carries 0.67 nats per token."
    ) in page.text
    assert "ignored" not in page.text
    said = (
        "Held-out loss on the target, in nats per token, from step 0 to step 2: "
        "with its own bottleneck from 4.60 to 2.89; with another text's bottleneck from 4.61 to 3.56; "
        "without a bottleneck from 4.70 to 4.10."
    )
    assert page.labels()[1:] == [said, said]
    for drawn in ("own bottleneck 2.89", "another text's 3.56", "no bottleneck 4.10", "own 2.89", "none 4.10"):
        assert drawn in page.text


@pytest.mark.parametrize(("gap", "ignored"), [(0.021, False), (0.019, True), (0.0, True), (-0.3, True)])
def test_an_ignored_bottleneck_gives_a_warning(tmp_path: Path, gap: float, ignored: bool) -> None:
    page = learn_page(tmp_path, [heldout(0, 4.6, 4.6), heldout(9, 3.0, 3.0 + gap)])
    assert ("The bottleneck is ignored:" in page.text) is ignored
    assert any(p.get("class") == "warning" for p in page.all("p")) is ignored
    assert all((word in page.text) is ignored for word in ("learn.targets", "learn.drop_target_tokens", "more steps"))
    assert ("carries 0.021 nats" in page.text) is not ignored
    digits = 2 if gap == -0.3 else 3
    assert f"is {3:.{digits}f} nats per token with its own bottleneck, {3 + gap:.{digits}f} with another" in page.text


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([heldout(0, 4.6, 4.6)], "Before the first step, the loss on the target is 4.600 nats"),
        ([heldout(0, 4.6, None), {"step": 5, "loss": 1.0}], "Before the first step, the loss on the target is 4.60"),
        ([heldout(5, 4.0, None)], "At the end of learn, the loss on the target is 4.00 nats per token with its own"),
        ([heldout(5, 4.0, 4.5), heldout(9, float("nan"), 4.5)], "At step 5, the last step with these measurements, t"),
        ([heldout(5, 4.0, 4.5), heldout(9, 3.0, float("nan"))], "is 4.00 nats per token with its own bottleneck, 4.50"),
        ([heldout(0, 4.0, 4.0), heldout(9, 3.0, float("nan"))], "At step 0, the last step with these measurements, t"),
        ([heldout(5, None, 4.5)], "another text's 4.50"),
    ],
)
def test_diagnostics_that_are_partly_missing(tmp_path: Path, entries: list[dict[str, Any]], sentence: str) -> None:
    page = learn_page(tmp_path, entries)
    assert sentence in page.text
    assert "ignored" not in page.text and "nan" not in page.text.split()


def test_perplexity_and_rank_are_shown_if_they_were_measured(tmp_path: Path) -> None:
    first = {"step": 0, "heldout_perplexity": 21.64, "effective_rank": 20, "effective_rank_limit": 256}
    last = {"step": 8, "heldout_perplexity": 13.61, "effective_rank": 84.6, "effective_rank_limit": 256}
    page = learn_page(tmp_path, [first, last])
    assert page.labels() == [
        "Learn: perplexity of held-out text, no bottleneck, from step 0 to step 8: "
        "heldout perplexity from 21.6 to 13.6.",
        "Learn: effective rank of the pooled vectors, from step 0 to step 8: effective rank from 20.0 to 84.6.",
    ]
    assert "84.6 of at most 256: the vectors of different texts differ in about this many directions." in page.text
    assert "nats" not in page.text
    (tmp_path / "bare").mkdir()
    page = learn_page(tmp_path / "bare", [{"step": 3, "effective_rank": 7.0}])
    assert len(page.labels()) == 1 and "7.00: the vectors" in page.text and "at most" not in page.text


def test_dev_pairs_are_drawn_after_the_curves_they_belong_to(tmp_path: Path) -> None:
    (tmp_path / "represent").mkdir()
    entries: list[dict[str, Any]] = [{"step": step, "loss": 3.0, "accuracy": 0.5} for step in range(10)]
    measured = {0: (2.5, 0.1, 0.3), 4: (1.25, 0.6, 0.71), 9: (1.5, 0.55, 0.7)}
    for step, values in measured.items():
        entries[step] |= dict(zip(("heldout_loss", "heldout_accuracy", "heldout_mrr"), values, strict=True))
    path = tmp_path / "represent" / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))
    assert page.labels() == [
        "Represent: contrastive loss: from 3 at step 0 to 3 at step 9.",
        "Represent: contrastive loss of the development pairs, from step 0 to step 9: "
        "mean over the queries from 2.50 to 1.50.",
        "Represent: accuracy within the batch: from 0.5 at step 0 to 0.5 at step 9.",
        "Represent: how the development pairs are ranked, from step 0 to step 9: "
        "share of queries whose document is ranked first from 0.10 to 0.55; "
        "mean reciprocal rank at 10 from 0.30 to 0.70.",
    ]
    assert "Lowest at step 4: 1.25." in page.text and "Curves of the development pairs are not smoothed." in page.text
    assert "first 0.55" in page.text and "MRR 0.70" in page.text
    drawn = "".join(re.findall(r"<svg.*?</svg>", (tmp_path / "report" / "index.html").read_text(), flags=re.S))
    assert "var(--lbr)" in drawn and "var(--learn)" not in drawn

    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "heldout_loss": null}\n')
    page = Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))
    assert len(page.labels()) == 1 and "development" not in page.text


def test_skipped_steps_are_named_marked_and_left_out_of_the_curves(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"step": step, "target_loss": 3.0, "skipped": 0} for step in range(1, 2000)]
    for step in (12, 13, 14, 15, 1500, 1700, 1999):
        entries[step - 1] |= {"skipped": 1, "target_loss": None if step == 13 else 1e6}
    page = learn_page(tmp_path, entries)
    assert (
        "7 steps of learn were skipped, because their loss or gradient was not finite or jumped: "
        "12, 13, 14, 15, 1,500 and 2 more. The curves leave them out"
    ) in page.text
    title = "Learn: loss on the target, through the bottleneck"
    assert page.labels() == [f"{title}: from 3 at step 1 to 3 at step 1998. Skipped steps marked: 7."]
    assert any("var(--warn)" in path.get("style", "") for path in page.all("path"))


@pytest.mark.parametrize(("steps", "said"), [([4], "1 step of learn was"), ([4, 6], "jumped: 4 and 6."), ([], None)])
def test_few_skipped_steps(tmp_path: Path, steps: list[int], said: str | None) -> None:
    entries = [{"step": step, "target_loss": 2.0, **({"skipped": True} if step in steps else {})} for step in range(9)]
    page = learn_page(tmp_path, entries)
    assert said in page.text if said else "skipped" not in page.text.lower()
    assert any("var(--warn)" in path.get("style", "") for path in page.all("path")) is bool(steps)


def test_a_run_that_skipped_every_step_reports_it(tmp_path: Path) -> None:
    page = learn_page(tmp_path, [{"step": step, "target_loss": None, "skipped": 1} for step in range(1, 4)])
    assert "3 steps of learn were skipped" in page.text and page.labels() == []


def test_long_runs_give_small_pages_with_exact_end_values(tmp_path: Path) -> None:
    entries = []
    for step in range(20_001):
        entries.append(heldout(step, 3.0 + step % 2, 4.0 + step % 2, 5.0) | {"heldout_perplexity": 20.0})
        entries[-1] |= {"target_loss": 3.0, **({"skipped": 1} if step % 3 == 0 else {})}
    entries[0]["heldout_target_loss"], entries[-1]["heldout_target_loss"] = 9.5, 2.25
    page = learn_page(tmp_path, entries)
    assert "with its own bottleneck from 9.50 to 2.25" in page.labels()[1] and "own bottleneck 2.25" in page.text
    assert (tmp_path / "report" / "index.html").stat().st_size < 100_000
    steps, values = _thinned_between_its_ends(Line(range(5000), [9.5, *[1.0] * 4998, 2.25], "own"))
    assert len(steps) == len(values) < 300
    assert (steps[0], values[0], steps[-1], values[-1]) == (0, 9.5, 4999, 2.25) and set(values[1:-1]) == {1.0}
