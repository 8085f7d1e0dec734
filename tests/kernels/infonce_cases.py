"""InfoNCE written out query by query, and the inputs on which every backend is compared with it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hypothesis import assume
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_dist.kernels.infonce import Backend, InfoNCE, info_nce, reference_info_nce

BACKENDS: tuple[Backend, ...] = ("tiles", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    queries: Tensor
    """float64, like the documents."""
    documents: Tensor
    positives: Tensor
    keywords: dict[str, Any]
    """Arguments of `info_nce` other than the temperature."""
    temperature: float = 0.2


def case(
    q: int, n: int, d: int, p: int = 1, seed: int = 0, query_ids: int = 0, document_ids: int = 0, **keywords: Any
) -> Case:
    """Random vectors; `query_ids` and `document_ids` are how many different ids to draw, none if 0."""
    generator = torch.Generator().manual_seed(seed)
    queries, documents = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (q, n))
    documents *= torch.linspace(0.1, 10, n)[:, None]  # norms that make a difference
    positives = torch.randint(-1, n, (q, p), generator=generator)
    positives[:, 0] = torch.randint(0, n, (q,), generator=generator)
    ids = {
        name: torch.randint(0, kinds, (rows,), generator=generator) * 7 - 3
        for name, kinds, rows in (("query_ids", query_ids, q), ("document_ids", document_ids, n))
        if kinds
    }
    return Case(queries, documents, positives[:, 0] if p == 1 else positives, {**ids, **keywords})


CASES = {
    "plain": case(7, 12, 16),
    "one document": case(3, 1, 5),
    "one query": case(1, 9, 5, p=2),
    "shared positives": case(9, 3, 8),
    "several positives": case(7, 20, 8, p=5),
    "document ids": case(8, 14, 8, document_ids=6),
    "query ids": case(9, 30, 8, query_ids=4),
    "all ids": case(9, 23, 8, p=3, query_ids=5, document_ids=12),
    "everything is a positive": case(5, 6, 8, p=9, query_ids=1),
    "margin": case(11, 29, 8, margin=0.1),
    "negative margin": case(11, 29, 8, p=2, margin=-0.15),
    "symmetric": case(9, 17, 8, p=3, query_ids=5, document_ids=11, margin=0.1, symmetric=True),
    "prefixes": case(9, 17, 24, prefixes=(24, 5, 11)),
    "everything": case(19, 37, 33, 3, 1, 12, 29, margin=0.2, symmetric=True, prefixes=(8, 32)),
    "no queries": case(0, 4, 8, document_ids=3, symmetric=True),
}


def known(c: Case, i: int, j: int) -> bool:
    """Whether document j is a positive of query i, in any of the ways."""
    given = (c.keywords.get(name) for name in ("query_ids", "document_ids"))
    query_ids, document_ids = (None if ids is None else ids.tolist() for ids in given)
    for row, columns in enumerate(c.positives.tolist()):
        if row == i or (query_ids is not None and query_ids[row] == query_ids[i]):
            for column in columns if isinstance(columns, list) else [columns]:
                if column == j or (
                    column >= 0 and document_ids is not None and document_ids[column] == document_ids[j]
                ):
                    return True
    return False


def direction(c: Case, scores: Tensor, scored: list[int], temperature: Tensor, transposed: bool) -> tuple[Any, ...]:
    """Loss, correct, masked, and the smallest difference between two cosines that are compared."""
    loss, correct, masked, gap = temperature * 0, 0, 0, math.inf
    cosines = scores.tolist()
    margin = c.keywords.get("margin")
    for i in range(len(scored)):
        own = i if transposed else scored[i]
        left = []
        for j in range(scores.shape[1]):
            if j == own:
                continue
            apart = cosines[i][j] - cosines[i][own]
            gap = min(gap, abs(apart), abs(apart - (margin or 0.0)))
            is_known = known(c, j, scored[i]) if transposed else known(c, i, j)
            if is_known or (margin is not None and apart > margin):
                masked += 1
            else:
                left.append(j)
        exponentials = (scores[i] / temperature).exp()
        loss = loss - (exponentials[own] / (exponentials[own] + exponentials[left].sum())).log()
        correct += all(cosines[i][j] < cosines[i][own] for j in left)
    return loss, correct, masked, gap


def definition(c: Case, queries: Tensor, documents: Tensor, temperature: Tensor) -> tuple[InfoNCE, float]:
    """The result in float64 by loops over queries and documents, and how close any comparison is to flipping."""
    scored = (c.positives if c.positives.ndim == 1 else c.positives[:, 0]).tolist()
    losses, counts, gaps = [], (0, 0), [math.inf]
    for width in sorted(c.keywords.get("prefixes") or [queries.shape[1]]):
        q, d = (x[:, :width] / x[:, :width].square().sum(1, keepdim=True).sqrt() for x in (queries, documents))
        loss, *counts_and_gap = direction(c, q @ d.T, scored, temperature, transposed=False)
        counts = counts_and_gap[:2]
        gaps.append(counts_and_gap[2])
        if c.keywords.get("symmetric"):
            back, _, _, gap = direction(c, d[scored] @ q.T, scored, temperature, transposed=True)
            loss = (loss + back) / 2
            gaps.append(gap)
        losses.append(loss)
    return InfoNCE(sum(losses) / len(losses), *(torch.tensor(count) for count in counts)), min(gaps)


def graded(result: InfoNCE, of: list[Tensor]) -> list[Tensor]:
    """What is compared: the loss and three times its gradients."""
    return [result.loss.detach(), *torch.autograd.grad(3.0 * result.loss, of)]


def check(
    c: Case, backend: Backend, dtype: torch.dtype, tile: int, device: str = "cpu", by_loops: bool = False
) -> None:
    """Loss, counts and all three gradients; our error is at most twice that of plain PyTorch, plus rounding."""
    keywords = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in c.keywords.items()}
    positives = c.positives.to(device)
    low = [x.to(device, dtype).requires_grad_() for x in (c.queries, c.documents)]
    low.append(torch.tensor(c.temperature, device=device, requires_grad=True))
    exact = [x.detach().double().requires_grad_() for x in low]
    if by_loops:
        truth, gap = definition(c, *exact)
        assume(gap > 1e-5)  # in float32 another cosine may be the largest, or above the margin
    else:
        truth = reference_info_nce(*exact[:2], positives, temperature=exact[2], **keywords)
    plain = reference_info_nce(*low[:2], positives, temperature=low[2], **keywords)
    ours = info_nce(*low[:2], positives, temperature=low[2], tile=tile, backend=backend, **keywords)
    for result in (ours, plain):
        assert result.correct.dtype == result.masked.dtype == torch.int64 and result.loss.dtype == torch.float32
        assert (int(result.correct), int(result.masked)) == (int(truth.correct), int(truth.masked))
    found = (graded(ours, low), graded(plain, low), graded(truth, exact))
    for mine, same, right, scale in zip(*found, scales(c, exact, backend, dtype), strict=True):
        assert mine.dtype == same.dtype and mine.shape == same.shape == right.shape
        if right.numel():
            mine, same, right = (x.double().reshape(-1, x.shape[-1] if x.ndim else 1) for x in (mine, same, right))
            error, allowed = ((x - right).abs().amax(1) for x in (mine, same))
            place = torch.finfo(found[0][0].dtype).eps * scale
            if right.shape[1] > 1:
                of = torch.finfo(dtype)  # one unit in the last place, also for subnormal numbers
                place = place + of.eps * right.abs().amax(1).clamp_min(of.smallest_normal)
            assert bool((error <= 2 * allowed + 2 * place).all()), (dtype, mine, right)


def scales(c: Case, exact: list[Tensor], backend: Backend, dtype: torch.dtype) -> list[Any]:
    """The size of what float32 rounds in the loss and in each row of its gradients, which may be small differences.

    Logits are as large as 1 / temperature, and the relative error of an exponential grows with them. The weights of a
    query sum to at most 2, those of a document to at most the number of queries; both are divided by norms.
    """
    logits = 1 / c.temperature
    widths = c.keywords.get("prefixes") or [exact[0].shape[1]]
    per_row = [
        torch.stack([x.detach()[:, :m].norm(dim=1).clamp_min(1e-12).reciprocal() for m in widths]).amax(0)
        for x in exact[:2]
    ]
    q, coarse = len(c.queries), torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    made = [q * logits, 3 * logits**2 * per_row[0], 3 * q * logits**2 * per_row[1], 3 * q * logits**3]
    if dtype != torch.float32 and (backend == "triton" or len(widths) > 1 or c.keywords.get("symmetric")):
        # triton's weights have the rows' precision, and so do the gradients of each direction and prefix
        made[1:3] = [scale * coarse / logits for scale in made[1:3]]
    if dtype != torch.float32 and backend == "triton":
        made[3] *= coarse / logits
    return made


class Largest(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def largest(backend: Backend) -> int:
    c = case(300, 500, 8, 2, 0, 1000, 2000, margin=0.9, symmetric=True, prefixes=(4, 8))
    inputs = [x.float().requires_grad_() for x in (c.queries, c.documents, torch.tensor(0.1).double())]
    with Largest() as seen:
        result = info_nce(*inputs[:2], c.positives, temperature=inputs[2], tile=64, backend=backend, **c.keywords)
        torch.autograd.grad(result.loss, inputs)
    return seen.elements
