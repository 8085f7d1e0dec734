"""Cross-entropy of a language-model head, fused with the head and one chunk of tokens at a time.

The ``[tokens, vocabulary]`` logits are the largest tensor of a small model's step. Here they exist for one chunk only:
the forward pass computes a chunk's loss and its gradients together, and the backward pass only scales the gradients.
On CUDA, liger-kernel's fused loss does the same if it is installed.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512
"""Tokens whose logits are in memory at a time."""


def reference_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, groups: Tensor, weights: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition, in float32, with all logits at once. Same arguments and results as `linear_cross_entropy`."""
    logits = hidden.float() @ head.float().T
    losses = F.cross_entropy(logits, labels, reduction="none")
    sums = torch.zeros(len(weights), dtype=losses.dtype).index_add(0, groups, losses)
    return (sums * weights).sum() + z_weight * logits.logsumexp(1).square().sum(), sums.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, z_weight: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_head = ctx.needs_input_grad[:2]
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        z_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        # chunks are summed in float32: in bfloat16 the later ones would be rounded away
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if of_head else None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head.T).float()
            label, weight = labels[part, None], weights[part, None]
            label_logit, top = logits.gather(1, label), logits.amax(1, keepdim=True)
            exponentials = logits.sub_(top).exp_()
            normalizer = exponentials.sum(1, keepdim=True)
            log_normalizer = normalizer.log() + top
            losses[part] = (log_normalizer - label_logit)[:, 0]
            z_sum += log_normalizer.square().sum()
            if grad_hidden is None and grad_head is None:
                continue
            # d loss / d logits = (weight + 2 z_weight logsumexp) softmax - weight one_hot, built in place
            scale = (weight + 2.0 * z_weight * log_normalizer) / normalizer
            low = exponentials.mul_(scale).scatter_add_(1, label, -weight).to(head.dtype)
            if grad_hidden is not None:
                torch.mm(low, head, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += low.T @ hidden[part]
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_head) if g is not None))
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum() + z_weight * z_sum, losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        saved, factor = list(ctx.saved_tensors), grads[0]
        grad_hidden = saved.pop(0).mul(factor) if ctx.needs_input_grad[0] else None
        grad_head = saved.pop(0).mul(factor).to(ctx.head_dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_head, None, None, None, None


def _chunked(
    hidden: Tensor, head: Tensor, labels: Tensor, groups: Tensor, weights: Tensor, z_weight: float, chunk: int
) -> tuple[Tensor, Tensor]:
    loss, losses = _LinearCrossEntropy.apply(hidden, head, labels, weights[groups], z_weight, chunk)  # type: ignore[no-untyped-call]
    return loss, torch.zeros_like(weights).index_add(0, groups, losses)


def _liger(
    hidden: Tensor, head: Tensor, labels: Tensor, groups: Tensor, weights: Tensor, z_weight: float
) -> tuple[Tensor, Tensor]:
    """liger-kernel's fused loss has no weights for tokens, so each group runs on its own."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = hidden.sum() * 0.0
    sums = torch.zeros_like(weights)
    for group in range(len(weights)):
        chosen = groups == group
        if not bool(chosen.any()):
            continue
        weight = float(weights[group])
        scale = z_weight / weight if weight else 0.0
        fused = LigerFusedLinearCrossEntropyLoss(
            reduction="sum", lse_square_scale=scale, return_z_loss=True, accum_dtype=torch.float32
        )
        result = fused(head, hidden[chosen], labels[chosen])  # its loss includes the z term
        loss = loss + weight * result.loss
        sums[group] = (result.loss - result.z_loss).detach()
    return loss, sums


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    groups: Tensor,
    weights: Tensor,
    z_weight: float = 0.0,
    *,
    chunk: int = CHUNK,
    backend: Literal["auto", "chunked", "liger"] = "auto",
) -> tuple[Tensor, Tensor]:
    """``sum_t weights[groups[t]] * -log softmax(hidden[t] @ head.T)[labels[t]]``, without the logits.

    Args:
        hidden: ``[tokens, d]``, any floating dtype.
        head: ``[vocabulary, d]``, the same dtype.
        labels: ``[tokens]`` int64, each below ``vocabulary``.
        groups: ``[tokens]`` int64, the group of each token, each below ``len(weights)``.
        weights: ``[groups]`` float32, the weight of each group's tokens in the sum.
        z_weight: weight of the z term that is added: the sum over tokens of the squared log-normaliser.
        chunk: tokens whose logits are in memory at a time.
        backend: `liger` needs CUDA and the package liger-kernel; `auto` uses it if possible.

    Returns:
        The weighted sum (float32, differentiable in `hidden` and `head`), and ``[groups]`` float32: the unweighted sum
        of each group's losses, for the log.
    """
    if backend == "auto":
        has_liger = hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None
        backend = "liger" if has_liger else "chunked"
    if backend == "liger":
        return _liger(hidden, head, labels, groups, weights, z_weight)
    return _chunked(hidden, head, labels, groups, weights, z_weight, chunk)
