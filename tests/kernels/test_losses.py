"""Both losses against their references, values and gradients."""

from __future__ import annotations

import pytest
import torch

from lbr_dist.kernels.cross_entropy import linear_cross_entropy, reference_cross_entropy
from lbr_dist.kernels.infonce import info_nce, reference_info_nce


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (9, 4), (33, 512), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(tokens: int, chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(77, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 77, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    loss, losses = linear_cross_entropy(hidden, head, labels, weights, chunk)
    grads = torch.autograd.grad(3.0 * loss, (hidden, head))
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    true_grads = torch.autograd.grad(3.0 * (truth * weights).sum(), exact)
    # the same precision by plain PyTorch: our error is at most twice its error, and rounding of the last place
    plain_losses = torch.nn.functional.cross_entropy((hidden @ head.T).float(), labels, reduction="none")
    plain = (plain_losses * weights).sum()
    plain_grads = torch.autograd.grad(3.0 * plain, (hidden, head))
    assert_close(losses, plain_losses.detach(), truth.detach(), dtype)
    assert_close(loss.detach(), plain.detach(), (truth * weights).sum().detach(), dtype)
    for ours, same, expected in zip(grads, plain_grads, true_grads, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, same, expected, dtype)
    reference, reference_losses = reference_cross_entropy(hidden.double(), head.double(), labels, weights)
    torch.testing.assert_close(reference.double(), (truth * weights).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference_losses.double(), truth.detach(), rtol=1e-5, atol=1e-5)


def assert_close(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    if truth.numel() == 0:
        assert ours.numel() == 0
        return
    place = torch.finfo(dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed + 2 * place


def test_cross_entropy_without_gradient_keeps_none() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(11, 8)
    loss, _ = linear_cross_entropy(hidden, head, torch.arange(5), torch.ones(5))
    assert not loss.requires_grad


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_info_nce(tile: int) -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(7, 16, generator=generator, requires_grad=True)
    documents = torch.randn(12, 16, generator=generator, requires_grad=True)
    positives = torch.tensor([3, 0, 11, 5, 5, 2, 7])
    masked = torch.rand(7, 12, generator=generator) < 0.3
    masked[torch.arange(7), positives] = False
    assert masked.any()
    loss, correct = info_nce(queries, documents, positives, masked, 0.05, tile)
    expected = reference_info_nce(queries, documents, positives, masked, 0.05)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(
        torch.autograd.grad(loss, (queries, documents)),
        torch.autograd.grad(expected, (queries, documents)),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=2)
    best = similarity.masked_fill(masked, -2.0).argmax(1)
    assert int(correct) == int((best == positives).sum())


def test_info_nce_without_queries_has_a_graph() -> None:
    queries = torch.zeros(0, 4, requires_grad=True)
    documents = torch.randn(3, 4, requires_grad=True)
    loss, correct = info_nce(queries, documents, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3).bool(), 0.05)
    loss.backward()  # type: ignore[no-untyped-call]
    assert documents.grad is not None and documents.grad.abs().max() == 0 and int(correct) == 0
