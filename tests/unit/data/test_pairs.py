"""Contrastive batches: negatives, batches of one source, and a stateless order."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.config import LearnConfig, RepresentConfig, RunConfig
from lbr_dist.data import sampler
from lbr_dist.data.pairs import PairBatch, TrainingPairs, load_pairs, load_with_dev, padded
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import DataError
from tests.configs import tiny_run


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(folder: Path, base: Path, pairs: list[dict[str, object]], **represent: object) -> RunConfig:
    """A run with pairs over documents d0 to d9; d9 has the same text as d0."""
    write(folder / "corpus.jsonl", [{"id": f"d{i}", "text": f"Document number {i % 9} of all."} for i in range(10)])
    write(folder / "train.jsonl", pairs)
    section = RepresentConfig(**({"batch_pairs": 4} | represent))  # type: ignore[arg-type]
    return tiny_run(folder / "run", base, folder, represent=section, learn=LearnConfig(steps=0))


def load(folder: Path, base: Path, pairs: list[dict[str, object]], **represent: object) -> TrainingPairs:
    return load_pairs(run_of(folder, base, pairs, **represent), TextTokenizer(base))


def row(name: str, query: str, positives: list[str], negatives: tuple[str, ...] = (), source: str = "a") -> dict:  # type: ignore[type-arg]
    return {"id": name, "query": query, "positive_ids": positives, "negative_ids": list(negatives), "source": source}


CROWD = [
    row("one", "large heart", ["d0", "d1"], ("d2", "d3")),
    row("two", "large heart", ["d2"], ("d4", "d9")),
    row("three", "small eye", ["d3"], ("d0",)),
    row("four", "pale skin", ["d9"], ("d5",)),
]


def test_known_positives_are_never_negatives(tmp_path: Path, tiny_model: Path) -> None:
    pairs = load(tmp_path, tiny_model, CROWD, hard_negatives=2)
    # `one` lists d2, which answers the same query in `two`; `two` lists d9 with the text of d0, an answer in `one`
    assert pairs.dropped_negatives == 2
    by_id = {pair.id: pair.negatives for pair in pairs.pairs}
    assert by_id == {"one": ("d3",), "two": ("d4",), "three": ("d0",), "four": ("d5",)}
    seen = set()
    for number in range(12):
        batch = pairs.batch(RepresentConfig(batch_pairs=4, hard_negatives=2), number, seed=1)
        assert len(set(batch.documents)) == len(batch.documents), "a text is scored once"
        for query, columns, name in zip(batch.queries, batch.positives, batch.query_names, strict=True):
            answers = {batch.documents[column] for column in columns}
            assert answers == pairs.known[query] & set(batch.documents), name
            seen.add((name, len(columns)))
    # `one` and `two` have the same query, so a second answer can be in the batch; the others have a single answer
    assert {("one", 2), ("two", 2), ("three", 1), ("four", 1)} <= seen


def test_texts_are_named_by_the_users_ids(tmp_path: Path, tiny_model: Path) -> None:
    batch = load(tmp_path, tiny_model, CROWD).batch(RepresentConfig(batch_pairs=4), 0, seed=1)
    names = {batch.name(text) for text in range(len(batch.texts))}
    assert {"query 'one'", "query 'four'", "document 'd3'"} <= names
    assert len(names) == len(batch.queries) + len(batch.documents)


def test_anchors_are_the_positives_seen_from_the_other_side() -> None:
    positives = [(0,), (1, 0), (0, 2), (2,)]
    batch = PairBatch([(1,), (2,), (3,), (4,)], [(5,), (6,), (7,)], positives, list("abcd"), list("efg"))
    assert [(row, *sorted(others)) for row, *others in batch.anchors] == [(0, 1, 2), (1,), (2, 0, 1), (3, 2)]
    assert padded(positives).tolist() == [[0, -1], [1, 0], [0, 2], [2, -1]]
    assert padded([]).shape == (0, 1)


def test_digest_tells_batches_apart() -> None:
    plain = PairBatch([(1, 2)], [(3,), (4,)], [(0,)], ["a"], ["b", "c"])
    others = [
        PairBatch([(1,)], [(2, 3), (4,)], [(0,)], ["a"], ["b", "c"]),
        PairBatch([(1, 2)], [(3,), (4,)], [(1,)], ["a"], ["b", "c"]),
        PairBatch([(1, 2)], [(4,), (3,)], [(0,)], ["a"], ["b", "c"]),
    ]
    assert len({batch.digest for batch in (plain, *others)}) == 4
    assert plain.digest == PairBatch([(1, 2)], [(3,), (4,)], [(0,)], ["x"], ["y", "z"]).digest
    assert 0 <= plain.digest < 2**62


def test_batches_of_one_source(tmp_path: Path, tiny_model: Path) -> None:
    sizes = {"a": 16, "b": 8, "c": 4}
    rows = [row(f"{s}{i}", f"{s} {i}", [f"d{i % 9}"], (), s) for s, count in sizes.items() for i in range(count)]
    pairs = load(tmp_path, tiny_model, rows, batches="by_source")
    section = RepresentConfig(batch_pairs=4, batches="by_source")
    drawn: Counter[str] = Counter()
    for number in range(7):  # one round: 4, 2 and 1 batches
        names = pairs.batch(section, number, seed=3).query_names
        assert len({name[0] for name in names}) == 1
        drawn.update(names)
    assert drawn == Counter(row["id"] for row in rows), "each pair once a round"
    assert pairs.batch(section, 5, seed=3) == pairs.batch(section, 5, seed=3)
    assert [pairs.batch(section, n, seed=3) for n in range(7)] != [pairs.batch(section, n, seed=4) for n in range(7)]


def test_batches_of_all_pairs_once(tmp_path: Path, tiny_model: Path) -> None:
    rows = [row(f"q{i}", f"query {i}", [f"d{i % 9}"], (f"d{(i + 1) % 9}",), "ab"[i % 2]) for i in range(11)]
    pairs = load(tmp_path, tiny_model, rows)
    section = RepresentConfig(batch_pairs=4, hard_negatives=1, batches="by_source")
    batches = pairs.once(section, seed=3)
    assert [len(batch.queries) for batch in batches] == [4, 4, 3]
    names = [name for batch in batches for name in batch.query_names]
    assert sorted(names) == sorted(str(row["id"]) for row in rows) and names != [row["id"] for row in rows]
    for batch in batches:
        for query, columns in zip(batch.queries, batch.positives, strict=True):
            assert {batch.documents[column] for column in columns} == pairs.known[query]
    assert any(len(batch.documents) > len({columns[0] for columns in batch.positives}) for batch in batches)
    # another number of steps, or training batches of one source, change nothing
    assert pairs.once(RepresentConfig(batch_pairs=4, hard_negatives=1, steps=7), seed=3) == batches
    assert pairs.once(section, seed=4) != batches


def test_development_pairs(tmp_path: Path, tiny_model: Path) -> None:
    config, tokenizer = run_of(tmp_path, tiny_model, CROWD), TextTokenizer(tiny_model)
    train, dev = load_with_dev(config, tokenizer)
    assert train == load_pairs(config, tokenizer) and dev is None
    path = tmp_path / "dev.jsonl"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dev=str(path)))
    write(path, [row("new", "stiff jaw", ["d5"]), row("other", "pale liver", ["d6", "d0"])])
    train, dev = load_with_dev(config, tokenizer)
    assert train == load_pairs(config, tokenizer)
    assert dev is not None and [pair.id for pair in dev.pairs] == ["new", "other"]
    assert dev.queries["new"] == tokenizer.encode(["find: stiff jaw"])[0] and set(dev.documents) == {"d0", "d5", "d6"}
    # two pairs are fewer than a batch; only training needs a full one
    assert [len(batch.queries) for batch in dev.once(config.represent, seed=0)] == [2]

    write(path, [row("new", "stiff jaw", ["d5"]), row("mine", "small  eye ", ["d6"]), row("too", "pale skin", ["d6"])])
    with pytest.raises(DataError) as raised:
        load_with_dev(config, tokenizer)
    said = str(raised.value)
    assert said.startswith(f"{path}: pair 'mine' has the query 'small  eye ' of pair 'three' in {config.data.train}, ")
    assert "and 1 more of its pairs repeat training queries" in said
    assert "never trained on" in said and "Remove these pairs" in said
    unmeasured = dataclasses.replace(config.represent, diagnose_every=0)
    assert load_with_dev(dataclasses.replace(config, represent=unmeasured), tokenizer)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    size=st.integers(1, 20),
    seed=st.integers(0, 99),
    rounds=st.integers(1, 4),
)
def test_sources_take_turns_in_proportion(sizes: list[int], size: int, seed: int, rounds: int) -> None:
    shares = [max(1, round(n / size)) for n in sizes]
    batches = [sampler.source_batch(sizes, size, step, seed) for step in range(rounds * sum(shares))]
    counts = Counter(source for source, _ in batches)
    assert [counts[source] for source in range(len(sizes))] == [rounds * share for share in shares]
    for source, items in enumerate(sizes):
        # each source's batches are a separate stream: every epoch has each item once
        stream = sorted(place for found, drawn in batches if found == source for place in drawn)
        whole = rounds * shares[source] * size // items
        assert [item for epoch, item in stream if epoch < whole] == list(range(items)) * whole
        assert len(stream) == len(set(stream))


def test_too_few_pairs(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"found 4 pairs, represent.batch_pairs is 5"):
        load(tmp_path, tiny_model, CROWD, batch_pairs=5)
    rows = [*CROWD, row("five", "stiff jaw", ["d4"], (), "b")]
    load(tmp_path, tiny_model, rows, batch_pairs=4)
    with pytest.raises(DataError, match=r"source 'b' has 1; with represent.batches `by_source` each needs .*\(4\)"):
        load(tmp_path, tiny_model, rows, batch_pairs=4, batches="by_source")
