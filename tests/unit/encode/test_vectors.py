"""Vectors in NumPy's format and in Parquet, written part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lbr_dist.encode.vectors import write_vectors
from lbr_dist.errors import DataError


def test_vector_files(tmp_path: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    vectors = torch.randn(3, 5).numpy()
    parts = vectors[:2], vectors[2:]
    write_vectors(tmp_path / "v.npy", ["a", "b", "c"], parts, 3)
    assert np.array_equal(np.load(tmp_path / "v.npy"), vectors)
    np.save(tmp_path / "whole.npy", vectors)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "v.ids").read_text() == "a\nb\nc\n"
    write_vectors(tmp_path / "v.parquet", ["a", "b", "c"], parts, 3)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors)
    with pytest.raises(DataError, match=r"'.txt', expected .npy or .parquet"):
        write_vectors(tmp_path / "v.txt", ["a"], parts, 3)
    with pytest.raises(AssertionError, match="3 vectors of 4"):
        write_vectors(tmp_path / "v.npy", ["a", "b", "c", "d"], parts, 4)
    assert np.array_equal(np.load(tmp_path / "v.npy"), vectors)  # the former file, whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.ids", "v.npy", "v.parquet", "whole.npy"]
