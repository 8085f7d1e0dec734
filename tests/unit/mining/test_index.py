"""Files of vectors, and the IVF index against the exact search."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lbr_dist.errors import DataError
from lbr_dist.evaluation.retrieval import exact_search
from lbr_dist.mining.index import Ivf, VectorFiles, build_ivf, ivf_lists


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = VectorFiles(tmp_path, "documents", 5, 2)
    with pytest.raises(DataError, match=r"documents: found NaN .* of texts range\(2, 4\)"):
        vectors.write(1, torch.tensor([[1.0], [math.nan]]))
    assert not list(tmp_path.iterdir())


def _vectors(folder: Path, name: str, values: torch.Tensor) -> VectorFiles:
    vectors = VectorFiles(folder, name, len(values), 300)
    for number in range(vectors.num_units):
        rows = vectors.rows_of(number)
        vectors.write(number, values[rows.start : rows.stop])
    return vectors


def test_ivf_finds_nearly_what_the_exact_search_finds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=generator)
    values = centres[torch.randint(0, 60, (5000,), generator=generator)]
    values = torch.nn.functional.normalize(values + 0.4 * torch.randn(5000, 16, generator=generator), dim=1)
    documents, queries = _vectors(tmp_path, "documents", values[:4000]), _vectors(tmp_path, "queries", values[4000:])
    searchable, k = 3900, 50
    report = build_ivf(tmp_path / "index", documents, searchable, queries, k, torch.device("cpu"), 1)
    assert (report["nlist"], report["nprobe"]) == ivf_lists(searchable) == (100, 13)
    scores, rows = exact_search(values[4000:], values[:searchable], k)
    found = Ivf(tmp_path / "index", report["nprobe"], 1).search(values[4000:].numpy(), k)
    sample = [i * 1000 // 200 for i in range(200)]
    recall = [len({r for r, _ in found[i]} & set(rows[i].tolist())) / k for i in range(1000)]
    assert report["recall"] == pytest.approx(np.mean([recall[i] for i in sample]), abs=1e-4)
    assert 0.9 < np.mean(recall) < 1 and report["recall_at"] == k and report["recall_queries"] == 200
    # all lists searched: the exact result, in its order
    complete = Ivf(tmp_path / "index", report["nlist"], 1).search(values[4000:].numpy(), k)
    assert [[r for r, _ in row] for row in complete] == rows.tolist()
    torch.testing.assert_close(torch.tensor([[s for _, s in row] for row in complete]), scores)


def test_ivf_of_few_documents_is_one_list() -> None:
    assert ivf_lists(1) == ivf_lists(77) == (1, 1)
    assert ivf_lists(10_000) == (256, 32) and ivf_lists(1_000_000) == (4000, 500)
