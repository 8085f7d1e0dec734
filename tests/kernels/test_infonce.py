"""InfoNCE's reference against its definition, and what all backends share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lbr_dist.kernels.infonce import excluded_columns, info_nce, reference_info_nce
from tests.kernels.infonce_cases import BACKENDS, CASES, definition, graded


@pytest.mark.parametrize("name", CASES)
def test_the_reference_matches_the_definition(name: str) -> None:
    c = CASES[name]
    exact = [x.double().clone().requires_grad_() for x in (c.queries, c.documents, torch.tensor(c.temperature))]
    truth, gap = definition(c, *exact)
    assert gap > 1e-5
    found = reference_info_nce(*exact[:2], c.positives, temperature=exact[2], **c.keywords)
    assert (int(found.correct), int(found.masked)) == (int(truth.correct), int(truth.masked))
    if len(c.queries):
        torch.testing.assert_close(graded(found, exact), graded(truth, exact), rtol=1e-10, atol=1e-10)


def test_excluded_columns() -> None:
    """An example of each way to be a known positive."""
    positives = torch.tensor([[4, 1, -1], [4, 2, 2], [0, -1, -1], [3, 5, 4]])
    document_ids = torch.tensor([9, 8, 7, 6, 5, 9])

    def found(transposed: bool, **ids: Tensor | None) -> list[list[int]]:
        arguments: dict[str, Any] = {"query_ids": None, "document_ids": None} | ids
        columns = excluded_columns(positives, 6, transposed=transposed, **arguments)
        assert columns.shape[1] == (columns >= 0).sum(1).max()
        return [sorted(j for j in row if j >= 0) for row in columns.tolist()]

    assert found(False) == [[1], [2], [], [4, 5]]
    assert found(False, document_ids=document_ids) == [[1], [2], [5], [0, 4, 5]]
    assert found(False, query_ids=torch.tensor([3, 1, 1, 2])) == [[1], [0, 2], [2, 4], [4, 5]]
    # rows 0 and 1 share document 4, which is a further positive of row 3
    assert found(True) == [[1, 3], [0, 3], [], []]
    assert found(True, document_ids=document_ids) == [[1, 3], [0, 3], [3], []]
    assert found(True, query_ids=torch.tensor([3, 1, 1, 2])) == [[1, 2, 3], [0, 2, 3], [1], []]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_batch_without_queries_gives_zero_gradients(symmetric: bool) -> None:
    queries, documents = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss, correct, masked = info_nce(queries, documents, none, temperature=temperature, symmetric=symmetric)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == int(correct) == int(masked) == 0
    assert documents.grad is not None and torch.equal(documents.grad, torch.zeros(3, 4))
    assert queries.grad is not None and queries.grad.shape == (0, 4)
    assert temperature.grad is not None and float(temperature.grad) == 0


def test_autocast_changes_nothing() -> None:
    c = CASES["everything"]
    for backend in BACKENDS:
        results = []
        for enabled in (False, True):
            inputs = [x.float().requires_grad_() for x in (c.queries, c.documents)]
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                result = info_nce(*inputs, c.positives, temperature=0.1, backend=backend, **c.keywords)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled and backend == "tiles"):
                results.append(graded(result, inputs))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_inputs_without_gradients_give_a_loss_without_one() -> None:
    c = CASES["everything"]
    assert not info_nce(c.queries, c.documents, c.positives, temperature=0.1, **c.keywords).loss.requires_grad


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf, torch.tensor(-1.0)])
def test_an_invalid_temperature_is_refused(temperature: float | Tensor) -> None:
    c = CASES["plain"]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"temperature: found {float(temperature)}"):
            info_nce(c.queries, c.documents, c.positives, temperature=temperature, backend=backend)


@pytest.mark.parametrize("prefixes", [(0, 4), (4, 17), (-1,)])
def test_an_invalid_prefix_is_refused(prefixes: tuple[int, ...]) -> None:
    c = CASES["plain"]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"prefixes: found (0|17|-1), expected widths from 1 to .* 16"):
            info_nce(c.queries, c.documents, c.positives, temperature=0.1, prefixes=prefixes, backend=backend)


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    c = CASES["plain"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, message in (("triton", "needs CUDA, found tensors on cpu"), ("dense", "found 'dense', expected auto")):
        with pytest.raises(ValueError, match=message):
            info_nce(c.queries, c.documents, c.positives, temperature=0.1, backend=backend)  # type: ignore[arg-type]
