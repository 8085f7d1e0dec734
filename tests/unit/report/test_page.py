"""The report's page: whole, escaped, self-contained, and there even where parts of a run are not."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.report.charts import Line, _apart, _thinned_between_its_ends, measured_lines, training_curve
from lbr_dist.report.page import LABELS, write_report

HOSTILE = "<script>alert(1)</script> \"'& <img src=x onerror=alert(2)> $x_1$ ü"
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


def test_the_page_says_the_result_in_one_sentence(html: str) -> None:
    text = Page(html).text.replace("\xa0", " ")
    assert (
        "LBR finds 84 % of the right documents within its first ten results, on average over 250 held-out queries; "
        "BM25 finds 66 %, the untouched base model finds 19 %."
    ) in text
    assert "arXiv 2601.11124), not a reproduction of its configuration." in text


def test_systems_come_in_order_with_their_numbers(html: str) -> None:
    page = Page(html)
    table = page.text[page.text.index("All measures") :]
    places = [table.index(label) for label in LABELS.values()]
    assert places == sorted(places)
    assert "0.7000.650\N{EN DASH}0.750" in table  # lbr's nDCG with its interval below
    assert "<b>0.700</b>" in html and "<b>0.520</b>" not in html
    for label in page.labels()[:2]:
        assert "BM25 0.520, 95 % interval 0.470 to 0.570" in label and "LBR: learn, then represent 0.700" in label


def test_differences_are_said_in_words(html: str) -> None:
    text = Page(html).text.replace("\xa0", " ")
    assert "LBR is 0.180 above BM25 (95 % interval of the difference +0.100 to +0.250)." in text
    minus = "\N{MINUS SIGN}"
    interval = f"(95 % interval of the difference {minus}0.200 to {minus}0.050)"
    assert f"The model after learn alone is 0.110 below BM25 {interval}." in text
    assert "The model after learn alone and the untouched base model cannot be told apart" in text


def test_curves_settings_and_hits_are_there(html: str) -> None:
    page = Page(html)
    labels = page.labels()
    assert len(labels) == 6 and all(svg["role"] == "img" for svg in page.all("svg"))
    assert labels[2] == "Learn: loss on the target, through the bottleneck: from 4 at step 1 to 4 at step 3000."
    for expected in ("1 h 30 min", "3.0 GiB", "12,345", "ZeRO stage", "Found nothing."):
        assert expected in page.text
    # relevance is said in words, beside the one in the legend
    assert page.text.count("✓ Right") == 2


def test_a_long_training_does_not_make_a_heavy_page(html: str) -> None:
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
    assert page.text.count(HOSTILE) == 12  # every place that shows a text, both charts among them
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "inf" not in page.text.split()


def test_a_page_without_curves_examples_or_most_systems(tmp_path: Path) -> None:
    metrics = {"domain": "Code", "systems": {"bm25": {"ndcg@10": 0.5, "recall@10": 0.996}, "lbr": {"mrr@10": 0.2}}}
    page = Page(write_report(tmp_path, metrics, []).read_text(encoding="utf-8"))
    text = page.text.replace("\xa0", " ")
    assert "BM25 finds 99.6 % of the right documents within its first ten results." in text
    assert len(page.labels()) == 2 and "How training went" not in text and "What the systems return" not in text
    assert "Settings" not in text and "\N{EN DASH}" in text


def test_an_empty_report_is_still_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))
    assert "No system was scored." in page.text and page.all("title") and page.all("meta")


def test_broken_lines_and_missing_keys_of_the_curves_are_passed_over(tmp_path: Path) -> None:
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


# ---- learn's diagnostics and skipped steps --------------------------------------------------------------------


def learn_page(tmp_path: Path, entries: list[dict[str, Any]]) -> Page:
    (tmp_path / "learn").mkdir()
    (tmp_path / "learn" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Page(write_report(tmp_path, {}, []).read_text(encoding="utf-8"))


def heldout(step: int, own: float | None, shuffled: float | None, without: float | None = None) -> dict[str, Any]:
    names = ("", "_shuffled", "_without")
    values = {f"heldout_target_loss{name}": v for name, v in zip(names, (own, shuffled, without), strict=True)}
    return {"step": step, **{name: value for name, value in values.items() if value is not None}}


def test_the_finding_is_said_in_a_sentence_and_drawn_for_both_widths(tmp_path: Path) -> None:
    entries = [heldout(0, 4.6, 4.61, 4.7), {"step": 1, "target_loss": 4.0}, heldout(2, 2.894, 3.556, 4.1)]
    page = learn_page(tmp_path, entries)
    assert (
        "At the end of learn a target token costs 2.89 nats through its own bottleneck, 3.56 through another text's "
        "and 4.10 without any: the bottleneck carries 0.67 nats a token."
    ) in page.text
    assert "ignored" not in page.text
    said = (
        "Held-out loss on the target, in nats a token, from step 0 to step 2: "
        "through its own bottleneck from 4.60 to 2.89; through another text's bottleneck from 4.61 to 3.56; "
        "without a bottleneck from 4.70 to 4.10."
    )
    assert page.labels()[1:] == [said, said]
    for drawn in ("own bottleneck 2.89", "another text's 3.56", "no bottleneck 4.10", "own 2.89", "none 4.10"):
        assert drawn in page.text


@pytest.mark.parametrize(("gap", "ignored"), [(0.021, False), (0.019, True), (0.0, True), (-0.3, True)])
def test_a_bottleneck_that_is_ignored_is_warned_of(tmp_path: Path, gap: float, ignored: bool) -> None:
    page = learn_page(tmp_path, [heldout(0, 4.6, 4.6), heldout(9, 3.0, 3.0 + gap)])
    assert ("The bottleneck is ignored:" in page.text) is ignored
    assert any(p.get("class") == "warning" for p in page.all("p")) is ignored
    assert all((word in page.text) is ignored for word in ("learn.targets", "learn.drop_target_tokens", "more steps"))
    assert ("carries 0.021 nats" in page.text) is not ignored
    digits = 2 if gap == -0.3 else 3
    assert f"costs {3:.{digits}f} nats through its own bottleneck, {3 + gap:.{digits}f} through another" in page.text


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([heldout(0, 4.6, 4.6)], "Before the first step a target token costs 4.600 nats"),
        ([heldout(0, 4.6, None), {"step": 5, "loss": 1.0}], "Before the first step a target token costs 4.60 nats"),
        ([heldout(5, 4.0, None)], "At the end of learn a target token costs 4.00 nats through its own bottleneck."),
        ([heldout(5, 4.0, 4.5), heldout(9, float("nan"), 4.5)], "At step 5, the last one with these measurements, a"),
        ([heldout(5, 4.0, 4.5), heldout(9, 3.0, float("nan"))], "costs 4.00 nats through its own bottleneck, 4.50"),
        ([heldout(0, 4.0, 4.0), heldout(9, 3.0, float("nan"))], "At step 0, the last one with these measurements, a"),
        ([heldout(5, None, 4.5)], "another text's 4.50"),
    ],
)
def test_diagnostics_that_are_partly_missing(tmp_path: Path, entries: list[dict[str, Any]], sentence: str) -> None:
    page = learn_page(tmp_path, entries)
    assert sentence in page.text
    assert "ignored" not in page.text and "nan" not in page.text.split()


def test_perplexity_and_rank_are_shown_where_they_are_measured(tmp_path: Path) -> None:
    first = {"step": 0, "heldout_perplexity": 21.64, "effective_rank": 20, "effective_rank_limit": 256}
    last = {"step": 8, "heldout_perplexity": 13.61, "effective_rank": 84.6, "effective_rank_limit": 256}
    page = learn_page(tmp_path, [first, last])
    assert page.labels() == [
        "Learn: perplexity of held-out text, no bottleneck, from step 0 to step 8: "
        "heldout perplexity from 21.6 to 13.6.",
        "Learn: effective rank of the pooled vectors, from step 0 to step 8: effective rank from 20.0 to 84.6.",
    ]
    assert "84.6 of at most 256: in about so many directions" in page.text and "nats" not in page.text
    (tmp_path / "bare").mkdir()
    page = learn_page(tmp_path / "bare", [{"step": 3, "effective_rank": 7.0}])
    assert len(page.labels()) == 1 and "7.00: in about so many" in page.text and "at most" not in page.text


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
        "share whose document comes first from 0.10 to 0.55; mean reciprocal rank at 10 from 0.30 to 0.70.",
    ]
    assert "Lowest at step 4: 1.25." in page.text and "Of the development pairs: as measured." in page.text
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


def test_a_run_that_skipped_every_step_still_says_so(tmp_path: Path) -> None:
    page = learn_page(tmp_path, [{"step": step, "target_loss": None, "skipped": 1} for step in range(1, 4)])
    assert "3 steps of learn were skipped" in page.text and page.labels() == []


def test_long_runs_with_frequent_diagnostics_stay_light_and_their_ends_exact(tmp_path: Path) -> None:
    entries = []
    for step in range(20_001):
        entries.append(heldout(step, 3.0 + step % 2, 4.0 + step % 2, 5.0) | {"heldout_perplexity": 20.0})
        entries[-1] |= {"target_loss": 3.0, **({"skipped": 1} if step % 3 == 0 else {})}
    entries[0]["heldout_target_loss"], entries[-1]["heldout_target_loss"] = 9.5, 2.25
    page = learn_page(tmp_path, entries)
    assert "through its own bottleneck from 9.50 to 2.25" in page.labels()[1] and "own bottleneck 2.25" in page.text
    assert (tmp_path / "report" / "index.html").stat().st_size < 100_000
    steps, values = _thinned_between_its_ends(Line(range(5000), [9.5, *[1.0] * 4998, 2.25], "own"))
    assert len(steps) == len(values) < 300
    assert (steps[0], values[0], steps[-1], values[-1]) == (0, 9.5, 4999, 2.25) and set(values[1:-1]) == {1.0}


@pytest.mark.parametrize(
    "ends", [(2.9, 2.9, 2.9), (2.9, 2.905, 4.0), (0.0, 0.0, 9.0), (9.0, 9.0, 9.0), (5.0, 1.0, 5.0)]
)
def test_labels_at_the_ends_keep_apart_in_order_and_inside(ends: tuple[float, ...]) -> None:
    places = _apart(ends, 1.5, 0.0, 9.0)
    assert all(upper - lower >= 1.5 - 1e-6 for lower, upper in itertools.pairwise(sorted(places)))
    assert min(places) >= 0 and max(places) <= 9
    for (end, place), (other_end, other_place) in itertools.combinations(zip(ends, places, strict=True), 2):
        assert end == other_end or (end < other_end) == (place < other_place)


def test_labels_that_want_one_place_lie_around_it() -> None:
    assert sorted(_apart((5.0, 5.0, 5.0), 1.0, 0.0, 9.0)) == pytest.approx([4, 5, 6])


def test_labels_of_lines_that_agree_do_not_lie_on_one_another() -> None:
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


def test_a_perplexity_that_ran_away_does_not_run_over_the_page() -> None:
    drawn = ticks(measured_lines([Line([0, 9], [20.0, 5.54e34], "t")], "t", (350, 190), 62, "x"))
    assert drawn[-1] == "5.5e+34" and max(map(len, drawn)) <= 7


@pytest.mark.parametrize("step", [0, 7])
def test_a_single_point_has_its_step_as_the_only_tick_below(step: int) -> None:
    curve = ticks(training_curve([step], [1.5], "t", "learn", "x"))
    line = ticks(measured_lines([Line([step], [1.5], "t")], "t", (350, 190), 62, "x"))
    assert [tick for tick in curve if "." not in tick] == [str(step)]
    assert [tick for tick in line if "." not in tick] == [str(step)] and line[-1] == "1.50"
