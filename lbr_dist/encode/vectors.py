"""Write any number of vectors with their ids to a file, part by part, in NumPy's format or Parquet.

    FILE.npy       ``[texts, d]`` float32, with FILE.ids beside it: one id a line
    FILE.parquet   columns `id` and `embedding`

A file gets its name when it is complete. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_dist.errors import DataError
from lbr_dist.storage.files import sync

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
    write = _write_npy if path.suffix == ".npy" else _write_parquet
    made = write(path, ids, parts, texts)
    try:
        for temporary, _ in made:
            sync(temporary)
        for temporary, final in made:
            os.replace(temporary, final)
    finally:
        for temporary, _ in made:
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def _unfinished(path: Path) -> Path:
    """The same name for every attempt, so that each one overwrites what an earlier one left behind."""
    return path.with_name(f".{path.name}.unfinished")


def _write_npy(path: Path, ids: Iterable[str], parts: Iterable[Vectors], texts: int) -> list[tuple[Path, Path]]:
    names = path.with_suffix(".ids")
    made = [(_unfinished(names), names), (_unfinished(path), path)]
    try:
        with made[0][0].open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{name}\n" for name in ids)
        with made[1][0].open("wb") as file:
            written = 0
            for part in parts:
                if not written:
                    shape = {"descr": "<f4", "fortran_order": False, "shape": (texts, part.shape[1])}
                    np.lib.format.write_array_header_1_0(file, shape)
                file.write(np.ascontiguousarray(part, "<f4").data)
                written += len(part)
        assert written == texts, f"{written} vectors of {texts}"
    except BaseException:
        for temporary, _ in made:
            temporary.unlink(missing_ok=True)
        raise
    return made


def _write_parquet(path: Path, ids: Iterable[str], parts: Iterable[Vectors], texts: int) -> list[tuple[Path, Path]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, names, written = _unfinished(path), iter(ids), 0
    writer: Any = None
    try:
        for part in parts:
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1), pa.float32()), part.shape[1])
            table = pa.table({"id": list(islice(names, len(part))), "embedding": column})
            if writer is None:
                writer = pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            written += len(part)
        assert written == texts, f"{written} vectors of {texts}"
        writer.close()
    except BaseException:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    return [(temporary, path)]
