"""InfoNCE over rows of queries and all documents of the global batch, one tile of queries at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_info_nce(
    queries: Tensor, documents: Tensor, positives: Tensor, masked: Tensor, temperature: float
) -> Tensor:
    """The plain truth: the dense matrix in float32. Same arguments as `info_nce`, summed over the queries."""
    scores = F.normalize(queries.float(), dim=1) @ F.normalize(documents.float(), dim=1).T / temperature
    return F.cross_entropy(scores.masked_fill(masked, float("-inf")), positives, reduction="sum")


def info_nce(
    queries: Tensor, documents: Tensor, positives: Tensor, masked: Tensor, temperature: float, tile: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum over the queries of ``-log softmax(cosine(query, documents) / temperature)[positive]``.

    Args:
        queries: ``[q, d]``, this rank's rows, float32, not normalised.
        documents: ``[n, d]``, every document of the global batch, float32, not normalised.
        positives: ``[q]`` int64, the column of each query's positive.
        masked: ``[q, n]`` bool, true for false negatives (never for the positive itself).
        temperature: divides the similarities.
        tile: queries whose scores are in memory at a time.

    Returns:
        The sum of the losses (differentiable), and how many queries score their positive highest.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4.
    """
    queries, documents = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    total = queries.new_zeros(()) + 0.0 * (queries.sum() + documents.sum())  # a graph even without queries
    correct = torch.zeros((), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), tile):
        rows = slice(start, start + tile)
        scores = (queries[rows] @ documents.T / temperature).masked_fill(masked[rows], float("-inf"))
        total = total + F.cross_entropy(scores, positives[rows], reduction="sum")
        correct += (scores.argmax(1) == positives[rows]).sum()
    return total, correct
