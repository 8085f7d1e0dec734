"""Cross-entropy against its reference: values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lbr_dist.kernels.cross_entropy import linear_cross_entropy, reference_cross_entropy


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (9, 4), (33, 512), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_weight", [0.0, 0.02])
def test_cross_entropy_matches_the_definition(tokens: int, chunk: int, dtype: torch.dtype, z_weight: float) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(77, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 77, (tokens,), generator=generator)
    groups = torch.randint(0, 3, (tokens,), generator=generator)
    weights = torch.tensor([0.3, 0.0, 1.7])

    def usual(hidden: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (hidden @ head.T).to(dtype)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        sums = torch.stack([losses[groups == group].sum() for group in range(3)])
        return (sums * weights).sum() + z_weight * logits.logsumexp(1).square().sum(), sums.detach()

    def graded(loss: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(3.0 * loss, of)]

    loss, sums = linear_cross_entropy(hidden, head, labels, groups, weights, z_weight, chunk=chunk)
    found = [*graded(loss, [hidden, head]), sums]
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    truth, true_sums = usual(*exact, torch.float64)
    # plain PyTorch in the same precision: our error is at most twice its error, plus rounding in the last place
    plain, plain_sums = usual(hidden, head, torch.float32)
    expected = [*graded(truth, exact), true_sums]
    for ours, same, right in zip(found, [*graded(plain, [hidden, head]), plain_sums], expected, strict=True):
        assert ours.dtype == same.dtype
        assert_close(ours, same, right, dtype)
    reference, reference_sums = reference_cross_entropy(hidden, head, labels, groups, weights, z_weight)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(reference.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reference_sums.double(), true_sums, rtol=tolerance, atol=tolerance)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    head, labels, groups = torch.randn(11, 8), torch.arange(5), torch.zeros(5, dtype=torch.int64)
    both = head.clone().requires_grad_()
    results = []
    for table in (head, both):
        loss, _ = linear_cross_entropy(hidden, table, labels, groups, torch.ones(1), 0.1, chunk=2)
        results.append(torch.autograd.grad(loss, hidden)[0])
    assert torch.equal(*results)


def assert_close(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    if truth.numel() == 0:
        assert ours.numel() == 0
        return
    place = torch.finfo(dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed + 2 * place


def test_without_gradients_none_are_kept() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(11, 8)
    loss, _ = linear_cross_entropy(hidden, head, torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.ones(1))
    assert not loss.requires_grad


LIGER = """
import torch
from lbr_dist.kernels.cross_entropy import linear_cross_entropy

torch.manual_seed(0)
hidden, head = (torch.randn(n, 24, requires_grad=True) for n in (9, 77))
labels, groups = torch.randint(0, 77, (9,)), torch.tensor([0, 2] * 4 + [0])
weights = torch.tensor([0.3, 1.0, 1.7])
for z_weight in (0.0, 0.02):
    found = []
    for backend in ("liger", "chunked"):
        loss, sums = linear_cross_entropy(hidden, head, labels, groups, weights, z_weight, backend=backend)
        found.append([loss.detach(), sums, *torch.autograd.grad(3.0 * loss, (hidden, head))])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-4)
"""


def test_liger_gives_the_same() -> None:
    """liger-kernel's Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIGER], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
