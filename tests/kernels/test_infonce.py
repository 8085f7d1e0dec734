"""InfoNCE's backends against its definition, written out query by query, and against the dense reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_dist.kernels.infonce import Backend, InfoNCE, excluded_columns, info_nce, reference_info_nce

BACKENDS: tuple[Backend, ...] = ("tiles", "reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    queries: Tensor
    """float64, as the documents."""
    documents: Tensor
    positives: Tensor
    keywords: dict[str, Any]
    """Of `info_nce`, but the temperature."""
    temperature: float = 0.2


def case(
    q: int, n: int, d: int, p: int = 1, seed: int = 0, query_ids: int = 0, document_ids: int = 0, **keywords: Any
) -> Case:
    """Random vectors; ids are below `query_ids` and `document_ids`, and None where those are 0."""
    generator = torch.Generator().manual_seed(seed)
    queries, documents = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (q, n))
    documents *= torch.linspace(0.1, 10, n)[:, None]  # norms that matter
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
    """Whether document j is a positive of query i, by any of the ways."""
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
    """Loss, correct, masked, and the least distance of a cosine to one that it is compared to."""
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
    """The result in float64 by loops over queries and documents, and how near it is to masking something else."""
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
    """Loss, counts and all three gradients; our error is at most twice that of plain PyTorch, and rounding."""
    keywords = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in c.keywords.items()}
    positives = c.positives.to(device)
    low = [x.to(device, dtype).requires_grad_() for x in (c.queries, c.documents)]
    low.append(torch.tensor(c.temperature, device=device, requires_grad=True))
    exact = [x.detach().double().requires_grad_() for x in low]
    if by_loops:
        truth, gap = definition(c, *exact)
        assume(gap > 1e-5)  # in float32 another one may be the largest, or above the margin
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
                of = torch.finfo(dtype)  # its last place, of subnormal numbers too
                place = place + of.eps * right.abs().amax(1).clamp_min(of.smallest_normal)
            assert bool((error <= 2 * allowed + 2 * place).all()), (dtype, mine, right)


def scales(c: Case, exact: list[Tensor], backend: Backend, dtype: torch.dtype) -> list[Any]:
    """What float32 rounds in the loss and in each row of its gradients, which may be small differences of it.

    Logits are as large as 1 / temperature, and so is, next to its weight, the relative error of an exponential. A query
    has weights of at most 2, a document of at most the number of queries; norms divide both.
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
        # triton's weights are of the rows' precision, and so are the gradients of both directions and all prefixes
        made[1:3] = [scale * coarse / logits for scale in made[1:3]]
    if dtype != torch.float32 and backend == "triton":
        made[3] *= coarse / logits
    return made


@pytest.mark.parametrize("tile", [1, 3, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_tiles(name: str, dtype: torch.dtype, tile: int) -> None:
    check(CASES[name], "tiles", dtype, tile)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name: str) -> None:
    c = CASES[name]
    exact = [x.double().clone().requires_grad_() for x in (c.queries, c.documents, torch.tensor(c.temperature))]
    truth, gap = definition(c, *exact)
    assert gap > 1e-5
    found = reference_info_nce(*exact[:2], c.positives, temperature=exact[2], **c.keywords)
    assert (int(found.correct), int(found.masked)) == (int(truth.correct), int(truth.masked))
    if len(c.queries):
        torch.testing.assert_close(graded(found, exact), graded(truth, exact), rtol=1e-10, atol=1e-10)


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
def test_any_layout(c: Case, dtype: torch.dtype, tile: int) -> None:
    check(c, "tiles", dtype, tile, by_loops=True)


def test_excluded_columns() -> None:
    """One of each way to be a known positive."""
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
def test_no_queries_have_a_graph(symmetric: bool) -> None:
    queries, documents = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss, correct, masked = info_nce(queries, documents, none, temperature=temperature, symmetric=symmetric)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == int(correct) == int(masked) == 0
    assert documents.grad is not None and torch.equal(documents.grad, torch.zeros(3, 4))
    assert queries.grad is not None and queries.grad.shape == (0, 4)
    assert temperature.grad is not None and float(temperature.grad) == 0


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, bool, bool]) -> None:
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
    """Norms are clamped as `F.normalize` clamps them; a small temperature overflows no exponential."""
    c = case(6, 9, 8)
    c.positives[:2] = 2
    c.documents[2] = 0.0
    c.documents[3] *= 1e-14
    c.queries[1] = 0.0
    for temperature in (0.2, 1e-3):
        check(c._replace(temperature=temperature), "tiles", torch.float32, 4)


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


class Precisions(TorchDispatchMode):
    """What float32 products are allowed to be made of, at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            self.seen.append(tuple(backend.fp32_precision for backend in backends))
        return func(*args, **(kwargs or {}))


def test_products_are_float32_whatever_is_allowed() -> None:
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


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    c = CASES["everything"]
    assert not info_nce(c.queries, c.documents, c.positives, temperature=0.1, **c.keywords).loss.requires_grad


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation gave."""

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


def test_the_matrix_is_never_held() -> None:
    assert largest("reference") >= 300 * 500
    assert largest("tiles") <= 500 * 16  # the documents, or as many ids


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf, torch.tensor(-1.0)])
def test_a_temperature_that_cannot_be(temperature: float | Tensor) -> None:
    c = CASES["plain"]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"temperature: found {float(temperature)}"):
            info_nce(c.queries, c.documents, c.positives, temperature=temperature, backend=backend)


@pytest.mark.parametrize("prefixes", [(0, 4), (4, 17), (-1,)])
def test_a_prefix_that_cannot_be(prefixes: tuple[int, ...]) -> None:
    c = CASES["plain"]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"prefixes: found (0|17|-1), expected widths from 1 to .* 16"):
            info_nce(c.queries, c.documents, c.positives, temperature=0.1, prefixes=prefixes, backend=backend)


def test_a_backend_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    c = CASES["plain"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, message in (("triton", "needs CUDA, found tensors on cpu"), ("dense", "found 'dense', expected auto")):
        with pytest.raises(ValueError, match=message):
            info_nce(c.queries, c.documents, c.positives, temperature=0.1, backend=backend)  # type: ignore[arg-type]


def triton_in_the_interpreter() -> None:
    """Run by `test_triton` in a process of its own."""
    from lbr_dist.kernels import infonce_triton

    torch.set_num_threads(1)
    check(CASES["everything"], "triton", torch.float32, 1)  # one block of everything
    infonce_triton.BLOCK, infonce_triton.PANEL, infonce_triton.PROGRAMS = 16, 32, 3
    for number, (name, c) in enumerate(CASES.items()):
        print(name, file=sys.stderr)
        check(c, "triton", DTYPES[number % 3], 1)
    for dtype in DTYPES:
        c = case(19, 37, 75, 2, document_ids=29, margin=0.2)  # d of several blocks
        by_column = [x.T.contiguous().T for x in (c.queries, c.documents)]
        check(Case(*by_column, *c[2:]), "triton", dtype, 1)
    infonce_triton.BLOCK = infonce_triton.PANEL = 64
    assert largest("triton") <= 500 * 16 * 4  # the interpreter copies what it gets as bytes


def triton_for_an_h100() -> None:
    """The kernels as machine code, which needs no GPU: types, shared memory, and products on the tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lbr_dist.kernels import infonce_triton as kernels

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    of_floats = ("query_scale", "document_scale", "limits", "tops", "totals", "logsumexp", "pull", "gradient", "scale")
    for dtype in DTYPES:
        pointers = dict.fromkeys(of_floats, torch.float32) | dict.fromkeys(("positives", "excluded"), torch.int64)
        pointers |= dict.fromkeys(("queries", "documents", "others"), dtype) | {"weights": kernels._weight_dtype(dtype)}
        types = {name: f"*{names[of]}" for name, of in pointers.items()} | {"counts": "*i32"}
        blocks = dict.fromkeys(("BLOCK_Q", "BLOCK_N", "BLOCK_M", "BLOCK_W"), kernels.BLOCK)
        blocks |= dict.fromkeys(("BLOCK_D", "BLOCK_K"), kernels._depth(dtype))
        known = {"width": 4096, "LIMITED": True, **kernels._settings(dtype), **blocks}
        options = {name: known[name] for name in ("num_warps", "num_stages")}
        for kernel in (kernels._statistics, kernels._weights, kernels._accumulate):
            arguments = kernel.arg_names
            signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in arguments}
            constants = {(place,): known[name] for place, name in enumerate(arguments) if name in known}
            aligned = [name.endswith("stride") or signature[name].startswith("*") for name in arguments]
            attributes = {(place,): [["tt.divisibility", 16]] for place, yes in enumerate(aligned) if yes}
            source = ASTSource(kernel, signature, constants, attributes)
            made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert made.metadata.shared <= 227 * 1024
            assert dtype == torch.float32 or "wgmma.mma_async" in made.asm["ptx"]


@pytest.mark.parametrize(
    "script", ["triton_in_the_interpreter", pytest.param("triton_for_an_h100", marks=pytest.mark.slow)]
)
def test_triton(script: str) -> None:
    """Triton's interpreter is chosen before Triton is imported, so each has a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(script == "triton_in_the_interpreter"))}
    command = f"from tests.kernels import test_infonce; test_infonce.{script}()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_triton_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], "triton", dtype, 1, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_on_a_gpu_in_several_blocks(dtype: torch.dtype) -> None:
    check(case(301, 1027, 4096, 3, 0, 250, 900, margin=0.2, symmetric=True), "triton", dtype, 1, device="cuda")
