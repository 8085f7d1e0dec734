"""Fixtures of the vocabulary tests: the corpora, and a base model that was extended with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.vocabulary.add import add_vocabulary
from tests.unit.vocabulary.cases import DOMAINS, Grown, write_corpus


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {name: write_corpus(folder / f"{name}.jsonl", make) for name, make in DOMAINS.items()}


@pytest.fixture(scope="session")
def grown(tiny_model: Path, corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """The tied base, the folder built from it with all three corpora, and the report."""
    out = tmp_path_factory.mktemp("grown") / "llama"
    return tiny_model, out, add_vocabulary(tiny_model, list(corpora.values()), out, 60)
