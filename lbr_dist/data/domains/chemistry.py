"""Chemistry: structures searched by systematic name, and systematic names searched by common name.

Each compound is in one of two tasks, and so has one document: its SMILES string, with its IUPAC name as the query, or
its IUPAC name, with its common name as the query. With both in one collection, a query would itself be a document.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbr_dist.data.domains.domain import (
    MAX_NEGATIVES,
    Domain,
    Source,
    Split,
    character_features,
    hash_order,
    hash_split,
    normalise,
    package_file,
    package_version,
    small_evaluation,
    stable_hash,
)
from lbr_dist.data.records import Pair
from lbr_dist.errors import DataError

REQUIREMENT = "chemicals==1.5.2"
DEV_SHARE, TEST_SHARE = 0.02, 0.03
MAX_CHARACTERS = 200
SYNONYMS_IN_TEXT = 3

Task = Literal["name-to-structure", "common-to-systematic"]


@dataclass(frozen=True, slots=True)
class Compound:
    """One row of the identifiers table."""

    cid: str
    formula: str
    smiles: str
    iupac: str
    common: str
    """Empty if the table has only a registry number or a systematic name."""
    synonyms: tuple[str, ...]

    @property
    def task(self) -> Task:
        odd = stable_hash("chemistry task", self.formula) % 2
        return "common-to-systematic" if self.common and odd else "name-to-structure"

    @property
    def document(self) -> str:
        return self.iupac if self.task == "common-to-systematic" else self.smiles

    @property
    def query(self) -> str:
        return self.common if self.task == "common-to-systematic" else self.iupac

    @property
    def text(self) -> str:
        """Everything known about the compound, for stage 1."""
        names = list(dict.fromkeys(name for name in (self.common, *self.synonyms) if name))[:SYNONYMS_IN_TEXT]
        also = f" Also called {'; '.join(names)}." if names else ""
        return f"{self.iupac}.{also} Formula {self.formula}. SMILES {self.smiles}"


def build(path: Path | None = None) -> Domain:
    """The chemistry domain, from the packaged table or from another one in the same format.

    Raises DataError if the package is missing or a row is malformed.
    """
    table = "Identifiers/chemical identifiers pubchem large.tsv"
    compounds = list(_compounds(path or package_file("chemicals", REQUIREMENT, table)))
    # isomers have the same formula, and so do different spellings of one structure
    splits = {each.cid: hash_split(each.formula, "chemistry split", DEV_SHARE, TEST_SHARE) for each in compounds}
    documents = {each.cid: each.document for each in compounds}
    texts = {f"{each.cid}-text": each.text for each in compounds if splits[each.cid] == "train"}
    pairs = _pairs(compounds, splits)
    small_test, small_documents = small_evaluation(pairs["test"], documents, character_features, "chemistry small")
    return Domain(
        name="chemistry",
        documents=documents,
        corpus=documents | texts,
        train=pairs["train"],
        dev=pairs["dev"],
        test=pairs["test"],
        small_test=small_test,
        small_documents=small_documents,
        sources=[
            Source(
                package="chemicals",
                version=package_version("chemicals"),
                content="chemical identifiers from PubChem",
                licence="MIT (package and table)",
                attribution="Caleb Bell and contributors (chemicals); PubChem, National Library of Medicine",
            )
        ],
        split_rule=(
            "By molecular formula: all compounds with a formula go to train, dev or test by a hash, so isomers "
            "stay together. A name is not a dev or test query if it means compounds of several splits, is in a "
            "training text, or is itself a document."
        ),
        corpus_rule=(
            "All documents (a SMILES string or a systematic name, never both for one compound), and for training "
            "compounds a text with names, formula and structure. No held-out relations."
        ),
    )


def _pairs(compounds: list[Compound], splits: dict[str, Split]) -> dict[Split, list[Pair]]:
    isomers: dict[tuple[str, Task], list[str]] = defaultdict(list)
    asked: dict[tuple[str, Task], list[Compound]] = defaultdict(list)
    owners: dict[str, set[Split]] = defaultdict(set)
    collection = {each.document for each in compounds}
    taught: set[str] = set()
    for each in compounds:
        isomers[each.formula, each.task].append(each.cid)
        asked[each.query, each.task].append(each)
        owners[normalise(each.query)].add(splits[each.cid])
        if splits[each.cid] == "train":
            taught.update(map(normalise, (each.iupac, each.common, *each.synonyms)))
    pairs: dict[Split, list[Pair]] = {"train": [], "dev": [], "test": [], "none": []}
    for (query, task), found in asked.items():
        # names that differ only in signs, such as (+) and (-), are two queries, but in the same split
        of = owners[normalise(query)]
        split: Split = next(iter(of)) if len(of) == 1 else "none"
        if split in ("dev", "test") and (normalise(query) in taught or query in collection):
            split = "none"
        positives = tuple(each.cid for each in found)
        alike = [cid for each in found for cid in isomers[each.formula, task] if cid not in positives]
        negatives = hash_order(dict.fromkeys(alike), f"chemistry negatives {query}")[:MAX_NEGATIVES]
        pairs[split].append(Pair(f"chemistry-{split}-{len(pairs[split])}", query, positives, tuple(negatives), task))
    return pairs


def _compounds(path: Path) -> Iterator[Compound]:
    """Compounds with a systematic name and a structure, each at most `MAX_CHARACTERS`; one per structure."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 9:
            raise DataError(
                f"{path}:{number}: found {len(fields)} tab-separated fields, expected at least 9 (cid, CAS, formula, "
                f"weight, SMILES, InChI, key, IUPAC name, common name). Install {REQUIREMENT}, or fix the line."
            )
        cid, _, formula, _, smiles, _, _, iupac, common, *synonyms = fields
        if not iupac or not smiles or max(len(iupac), len(smiles)) > MAX_CHARACTERS or smiles in seen:
            continue
        seen.add(smiles)
        plain = tuple(name for name in synonyms if _is_word(name) and normalise(name) != normalise(iupac))
        usable = _is_word(common) and normalise(common) != normalise(iupac)
        yield Compound(f"cid-{cid}", formula, smiles, iupac, common if usable else "", plain)


def _is_word(name: str) -> bool:
    """Whether people use this name: nearly all registry numbers, keys and systematic names contain digits."""
    return bool(re.search(r"[a-z]{4}", name, re.IGNORECASE)) and not re.search(r"\d|^[a-z]{14}-[a-z]{10}-[a-z]$", name)
