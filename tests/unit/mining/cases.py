"""A small corpus with pairs, and a mining of it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_dist.mining import mine as mining
from lbr_dist.mining.candidates import Candidates
from lbr_dist.mining.work import MiningSettings, prepare
from lbr_dist.ranks.group import Ranks
from tests import tiny

ALONE = Ranks.alone()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path) -> Path:
    """A corpus with some texts twice, and pairs: two share a query, and one has two positives."""
    corpus = [{"id": name, "text": text} for name, text in tiny.texts().items()]
    corpus += [{"id": f"{row['id']}-again", "text": f"  {row['text'].upper()}\n"} for row in corpus[10:50:5]]
    pairs = [{k: v for k, v in row.items() if k != "negative_ids"} for row in tiny.pairs()]
    pairs.append({"id": "same query", "query": "LARGE  heart", "positive_ids": ["d9"]})
    pairs.append({"id": "two positives", "query": "curved skin", "positive_ids": ["d40", "d15-again"]})
    write(folder / "corpus.jsonl", corpus)
    write(folder / "train.jsonl", pairs)
    return folder


def settings(folder: Path, model: Path | None, **changes: Any) -> MiningSettings:
    given: dict[str, Any] = {"miner": "model" if model else "bm25", "margin_percent": 0.95, "unit": 16}
    return MiningSettings(
        pairs=str(folder / "train.jsonl"),
        documents=str(folder / "corpus.jsonl"),
        out=str(folder / "mined.jsonl"),
        model=None if model is None else str(model),
        **given | changes,
    )


def mine(chosen: MiningSettings, printed: list[str] | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    say: Callable[[str], None] = [].append if printed is None else printed.append  # type: ignore[assignment]
    prepare(chosen, say)
    summary = mining.mine(chosen, Candidates.read(chosen.pairs, chosen.documents), ALONE, say)
    assert summary is not None
    return [json.loads(line) for line in Path(chosen.out).read_text().splitlines()], summary
