"""InfoNCE in tiles of plain PyTorch: exact in every layout, without the whole matrix of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_dist.kernels.infonce import info_nce
from tests.kernels.infonce_cases import CASES, DTYPES, Case, case, check, largest


@pytest.mark.parametrize("tile", [1, 3, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_tiles_match_the_reference(name: str, dtype: torch.dtype, tile: int) -> None:
    check(CASES[name], "tiles", dtype, tile)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    q, n, d = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(2, 9))
    return case(
        q,
        n,
        d,
        p=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**20)),
        query_ids=draw(st.integers(0, q)),
        document_ids=draw(st.integers(0, n)),
        margin=draw(st.sampled_from([None, 0.05, 0.3, -0.2])),
        symmetric=draw(st.booleans()),
        prefixes=draw(st.none() | st.lists(st.integers(1, d), min_size=1, max_size=3)),
    )


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from(DTYPES), st.integers(1, 13))
@example(CASES["everything is a positive"], torch.float32, 2)
def test_any_layout_matches_the_definition(c: Case, dtype: torch.dtype, tile: int) -> None:
    check(c, "tiles", dtype, tile, by_loops=True)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_gradient_is_the_same_if_it_is_the_only_one(wanted: tuple[bool, bool, bool]) -> None:
    c = CASES["everything"]
    everything = (c.queries, c.documents, torch.tensor(c.temperature).double())
    all_of_them = [x.float().requires_grad_() for x in everything]
    some = [x.detach().float().requires_grad_(want) for x, want in zip(everything, wanted, strict=True)]
    gradients = []
    for inputs in (all_of_them, some):
        q, d, temperature = inputs
        result = info_nce(q, d, c.positives, temperature=temperature, tile=8, **c.keywords)
        gradients.append(torch.autograd.grad(result.loss, inputs[wanted.index(True)])[0])
    assert torch.equal(*gradients)


def test_zero_rows_and_large_logits() -> None:
    """Norms are clamped as in `F.normalize`, and exponentials don't overflow at a small temperature."""
    c = case(6, 9, 8)
    c.positives[:2] = 2
    c.documents[2] = 0.0
    c.documents[3] *= 1e-14
    c.queries[1] = 0.0
    for temperature in (0.2, 1e-3):
        check(c._replace(temperature=temperature), "tiles", torch.float32, 4)


class Precisions(TorchDispatchMode):
    """Records the precision that is allowed for float32 products, at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            self.seen.append(tuple(backend.fp32_precision for backend in backends))
        return func(*args, **(kwargs or {}))


def test_products_are_float32_whatever_the_process_allows() -> None:
    c = CASES["plain"]
    inputs = [x.float().requires_grad_() for x in (c.queries, c.documents)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precisions() as of:
            result = info_nce(*inputs, c.positives, temperature=0.1, backend="tiles")
            torch.autograd.grad(result.loss, inputs)
            assert of.seen == [("ieee", "ieee")] * 4
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_whole_matrix_is_never_in_memory() -> None:
    assert largest("reference") >= 300 * 500
    assert largest("tiles") <= 500 * 16  # the documents, or the same number of ids
