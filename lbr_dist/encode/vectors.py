"""Write any number of vectors with their ids to a file, part by part, in NumPy's format or Parquet.

    FILE.npy       ``[texts, d]`` float32, with FILE.ids beside it: one id a line
    FILE.parquet   columns `id` and `embedding`

A file gets its name when it is complete. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_dist.errors import DataError
from lbr_dist.storage.files import replacing

Vectors = NDArray[np.float32]

ENDINGS = (".npy", ".parquet")


def check_ending(path: Path) -> None:
    """Raises DataError if the file's name ends in none of `ENDINGS`."""
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: found the ending {path.suffix!r}, expected {' or '.join(ENDINGS)}.")


def write_vectors(path: Path, ids: Iterable[str], parts: Iterable[Vectors], texts: int) -> None:
    """Write vectors with their ids, one part in memory at a time.

    Args:
        path: its name ends in one of `ENDINGS`.
        ids: one for each vector; for `.npy` none with a line break.
        parts: ``[n, d]`` each, in the order of the ids.
        texts: total number of vectors.

    Raises:
        DataError: if the name ends in none of `ENDINGS`.
    """
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        _write_npy(path, ids, parts, texts)
    else:
        _write_parquet(path, ids, parts, texts)


def _unfinished(path: Path) -> Path:
    """The same name for every attempt, so that each one overwrites what an earlier one left behind."""
    return path.with_name(f".{path.name}.unfinished")


def _write_npy(path: Path, ids: Iterable[str], parts: Iterable[Vectors], texts: int) -> None:
    names = path.with_suffix(".ids")
    # the vectors get their name last
    with replacing(path, _unfinished(path)) as vectors_file, replacing(names, _unfinished(names)) as names_file:
        with names_file.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(f"{name}\n" for name in ids)
        with vectors_file.open("wb") as file:
            written = 0
            for part in parts:
                if not written:
                    shape = {"descr": "<f4", "fortran_order": False, "shape": (texts, part.shape[1])}
                    np.lib.format.write_array_header_1_0(file, shape)
                file.write(np.ascontiguousarray(part, "<f4").data)
                written += len(part)
        assert written == texts, f"{written} vectors of {texts}"


def _write_parquet(path: Path, ids: Iterable[str], parts: Iterable[Vectors], texts: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, written = iter(ids), 0
    writer: Any = None
    with replacing(path, _unfinished(path)) as temporary:
        try:
            for part in parts:
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1), pa.float32()), part.shape[1])
                table = pa.table({"id": list(islice(names, len(part))), "embedding": column})
                if writer is None:
                    writer = pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
                written += len(part)
            assert written == texts, f"{written} vectors of {texts}"
        finally:
            if writer is not None:
                writer.close()
