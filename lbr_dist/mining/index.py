"""The search for negatives: vectors in files on disk, and exact, IVF or BM25 search in them.

Work is split into units whose size does not depend on the number of ranks. A vector or a score may differ in the last
bit with what else is computed in the same call, so units of another size could change the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbr_dist.errors import ConfigError, DataError
from lbr_dist.evaluation.retrieval import Bm25, best_positive, search_blocks
from lbr_dist.mining.candidates import Candidates
from lbr_dist.storage.files import atomic_file, replacing

Ranked = list[tuple[int, float]]
Float32 = npt.NDArray[np.float32]

_BLOCK = 16384
_RECALL_QUERIES = 200
_TRAINING_VECTORS = 64
"""Per IVF list; faiss warns below 39, and ignores those above 256."""


class VectorFiles:
    """``[count, d]`` float32 in files of `unit` rows each, each written atomically."""

    def __init__(self, folder: Path, name: str, count: int, unit: int) -> None:
        self.folder, self.name, self.count, self.unit = folder, name, count, unit

    @property
    def num_units(self) -> int:
        return math.ceil(self.count / self.unit)

    def rows_of(self, number: int) -> range:
        """The rows of a unit."""
        return range(number * self.unit, min(self.count, (number + 1) * self.unit))

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.npy"

    def write(self, number: int, vectors: Tensor) -> None:
        """Write a unit's vectors; raises DataError if they are not finite."""
        if not bool(torch.isfinite(vectors).all()):
            raise DataError(
                f"{self.name}: found NaN or infinity in the vectors of texts {self.rows_of(number)}, expected finite "
                "numbers. The model that made them has diverged; look at its metrics.jsonl."
            )
        with atomic_file(self.path(number)) as file:
            np.save(file, vectors.float().numpy())

    def read(self, number: int) -> Float32:
        """A unit's vectors, memory-mapped from their file."""
        vectors: Float32 = np.load(self.path(number), mmap_mode="r")
        return vectors

    def take(self, rows: Sequence[int]) -> Float32:
        """The given rows, in that order."""
        units = np.asarray(rows) // self.unit
        taken = np.empty((len(rows), self.read(0).shape[1]), np.float32)
        for number in np.unique(units).tolist():
            where = np.flatnonzero(units == number)
            taken[where] = self.read(number)[np.asarray(rows)[where] - number * self.unit]
        return taken

    def blocks(self, count: int) -> Iterator[Tensor]:
        """The first `count` rows, in blocks of about 16,384 that depend only on `unit`."""
        together = max(1, _BLOCK // self.unit)
        for first in range(0, math.ceil(count / self.unit), together):
            numbers = range(first, min(self.num_units, first + together))
            block = np.concatenate([self.read(number) for number in numbers])
            yield torch.from_numpy(block[: count - first * self.unit])


# ---- IVF ----------------------------------------------------------------------------------------------------------


def _faiss(threads: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"--index ivf: faiss cannot be imported ({error}). Install it with `pip install 'lbr-dist[mining]'`, or "
            "use --index exact, which needs no package."
        ) from None
    faiss.omp_set_num_threads(threads)
    return faiss


def ivf_lists(count: int) -> tuple[int, int]:
    """The number of lists in the index, and of lists searched per query, for `count` vectors.

    4 x sqrt(n) lists, as in faiss's guidelines, if that leaves 39 vectors to train the centre of each; else fewer. An
    eighth of them is searched: mining asks for a hundred neighbours, which are in more lists than the first few.
    """
    lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
    return lists, min(lists, max(8, math.ceil(lists / 8)))


class Ivf:
    """An inverted file of flat vectors (faiss `IndexIVFFlat`, inner product), memory-mapped from its file."""

    def __init__(self, path: Path, probed: int, threads: int) -> None:
        faiss = _faiss(threads)
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        self._index.nprobe = probed

    def search(self, queries: Float32, k: int) -> list[Ranked]:
        """The k nearest of each query, best first and ties by row; fewer if the searched lists hold fewer."""
        scores, rows = self._index.search(np.ascontiguousarray(queries), k)
        ranked = []
        for row_scores, row_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            found = [(row, score) for row, score in zip(row_rows, row_scores, strict=True) if row >= 0]
            ranked.append(sorted(found, key=lambda each: (-each[1], each[0])))
        return ranked


def build_ivf(
    path: Path, documents: VectorFiles, count: int, queries: VectorFiles, k: int, device: torch.device, threads: int
) -> dict[str, Any]:
    """Train and fill the index of the first `count` documents, and measure it. Holds all vectors in memory.

    Returns:
        `nlist`, `nprobe`, and `recall`: the share of the exact search's first k (`recall_at`) that the index finds too,
        over up to 200 queries (`recall_queries`), evenly spaced.
    """
    faiss = _faiss(threads)
    lists, probed = ivf_lists(count)
    width = documents.read(0).shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    training = min(count, _TRAINING_VECTORS * lists)
    index.train(documents.take([i * count // training for i in range(training)]))
    for block in documents.blocks(count):
        index.add(block.numpy())
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))
    del index
    sampled = min(queries.count, _RECALL_QUERIES)
    sample = queries.take([i * queries.count // sampled for i in range(sampled)])
    _, exact = search_blocks(torch.from_numpy(sample).to(device), documents.blocks(count), k)
    found = Ivf(path, probed, threads).search(sample, k)
    hits = sum(len({row for row, _ in a} & set(b)) for a, b in zip(found, exact.tolist(), strict=True))
    recall = round(hits / exact.numel(), 4)
    return {
        "nlist": lists,
        "nprobe": probed,
        "recall": recall,
        "recall_at": exact.shape[1],
        "recall_queries": sampled,
    }


# ---- searches -----------------------------------------------------------------------------------------------------

Search = Callable[[range, Callable[[int], int]], Iterator[tuple[Ranked, float]]]
"""(pairs, depth of a pair) -> for each pair its ranked searchable rows, and the lowest score of its positives."""


def model_search(
    candidates: Candidates, documents: VectorFiles, queries: VectorFiles, ivf: Ivf | None, device: torch.device
) -> Search:
    """Inner products of the model's vectors. The given pairs must be a unit of `queries`."""

    def search(pairs: range, depth: Callable[[int], int]) -> Iterator[tuple[Ranked, float]]:
        vectors = np.array(queries.read(pairs.start // queries.unit))
        deepest = max(map(depth, pairs))
        if ivf is not None:
            found = ivf.search(vectors, deepest)
        else:
            blocks = documents.blocks(candidates.num_searchable)
            scores, rows = search_blocks(torch.from_numpy(vectors).to(device), blocks, deepest)
            found = [list(zip(r, s, strict=True)) for r, s in zip(rows.tolist(), scores.tolist(), strict=True)]
        for pair, vector, ranked in zip(pairs, vectors.astype(np.float64), found, strict=True):
            positives = documents.take(candidates.positive_rows(pair)).astype(np.float64)
            yield ranked, float(np.float32((positives * vector).sum(axis=1).min()))

    return search


def bm25_search(candidates: Candidates, tokens: Literal["words", "characters"]) -> Search:
    """BM25; a document that shares no token with the query is not a candidate."""
    index = Bm25(candidates.texts, tokens)

    def search(pairs: range, depth: Callable[[int], int]) -> Iterator[tuple[Ranked, float]]:
        for pair in pairs:
            scores = index.scores(candidates.pairs[pair].query)
            best, rows = best_positive(scores[: candidates.num_searchable], depth(pair))
            ranked = [(row, s) for row, s in zip(rows.tolist(), best.tolist(), strict=True) if s > 0]
            yield ranked, float(scores[candidates.positive_rows(pair)].min())

    return search
