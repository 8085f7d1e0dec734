"""Write a domain to the files that a run reads: corpus, pairs, test collection and a manifest.

    corpus.jsonl                 id, text: what stage 1 learns from, and every document that a pair names
    train.jsonl dev.jsonl test.jsonl    id, query, positive_ids, negative_ids, source
    test_documents.jsonl         id, text: the collection that the evaluation searches
    small/                       test.jsonl and test_documents.jsonl for a machine without an accelerator
    manifest.json                counts, sources with their licences, SHA-256 of each file, and how it was split

The same packages give the same bytes, wherever and whenever it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lbr_dist.data.domains import Domain
from lbr_dist.data.records import Pair, write_jsonl
from lbr_dist.errors import DataError

BUILDER_VERSION = 1
DOMAINS = ("medical", "chemistry", "code")


def build_domain(name: str, out: str | Path) -> dict[str, Any]:
    """Builds one of `DOMAINS` into the folder `out` and returns its manifest, which is also written there.

    The manifest is written last: a folder with one is complete. Raises DataError if the name is unknown, or the
    domain's package is missing.
    """
    if name not in DOMAINS:
        raise DataError(
            f"domain: found {name!r}, expected one of {', '.join(DOMAINS)}. "
            "For your own texts, write the files yourself; `lbr_dist/data/records.py` lists the formats."
        )
    return write_domain(importlib.import_module(f"lbr_dist.data.domains.{name}").build(), Path(out))


def write_domain(domain: Domain, out: Path) -> dict[str, Any]:
    """Writes the files of `domain` to the folder `out` and returns the manifest."""
    small = {document: domain.documents[document] for document in domain.small_documents}
    files: dict[str, Iterable[Mapping[str, Any]]] = {
        "corpus.jsonl": _texts(domain.corpus),
        "train.jsonl": _pairs(domain.train),
        "dev.jsonl": _pairs(domain.dev),
        "test.jsonl": _pairs(domain.test),
        "test_documents.jsonl": _texts(domain.documents),
        "small/test.jsonl": _pairs(_within(domain.small_test, small)),
        "small/test_documents.jsonl": _texts(small),
    }
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: found a file, expected a folder to write to. Name another folder.")
    manifest_path = out / "manifest.json"
    manifest_path.unlink(missing_ok=True)
    counts, digests = {}, {}
    for name, rows in files.items():
        counts[name] = write_jsonl(out / name, rows)
        with (out / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = {
        "name": domain.name,
        "builder_version": BUILDER_VERSION,
        "counts": counts,
        "sha256": digests,
        "sources": [dataclasses.asdict(source) for source in domain.sources],
        "split_rule": domain.split_rule,
        "corpus_rule": domain.corpus_rule,
        "small_rule": (
            "A sample of the test queries by hash; their positives, and the documents whose texts are most similar "
            "to these. The choice does not depend on the queries' words."
        ),
    }
    # replaced atomically, so that no reader sees half of it
    temporary = manifest_path.with_name(".manifest.json.tmp")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(manifest_path)
    return manifest


def _within(pairs: Iterable[Pair], documents: Mapping[str, str]) -> Iterator[Pair]:
    """The pairs without negatives that are not in the collection."""
    for pair in pairs:
        yield dataclasses.replace(pair, negatives=tuple(name for name in pair.negatives if name in documents))


def _texts(texts: Mapping[str, str]) -> Iterator[dict[str, str]]:
    return ({"id": document, "text": text} for document, text in texts.items())


def _pairs(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        yield {
            "id": pair.id,
            "query": pair.query,
            "positive_ids": list(pair.positives),
            "negative_ids": list(pair.negatives),
            "source": pair.source,
        }
