"""Cross-entropy of a language-model head, one chunk of tokens at a time.

The ``[tokens, vocabulary]`` logits are the largest tensor of a small model's step. Here they exist for one
chunk only: the forward pass computes a chunk's loss and its gradients together, and the backward pass scales
what is already there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The plain truth in float32. Same arguments and results as `linear_cross_entropy`."""
    losses = F.cross_entropy(hidden.float() @ head.float().T, labels, reduction="none")
    return (losses * weights).sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        with_grad = any(ctx.needs_input_grad[:2])
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        # chunks add up in float32: in bfloat16 the later ones would be rounded away
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if with_grad else None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head.T).float()
            label, weight = labels[part, None], weights[part, None]
            label_logit, top = logits.gather(1, label), logits.amax(1, keepdim=True)
            exponentials = logits.sub_(top).exp_()
            normalizer = exponentials.sum(1, keepdim=True)
            losses[part] = (normalizer.log() + top - label_logit)[:, 0]
            if grad_hidden is None or grad_head is None:
                continue
            # d loss / d logits = weight * (softmax - one_hot), built in place
            low = exponentials.mul_(weight / normalizer).scatter_add_(1, label, -weight).to(head.dtype)
            torch.mm(low, head, out=grad_hidden[part])
            grad_head += low.T @ hidden[part]
        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        factor = grads[0]
        return grad_hidden * factor.to(grad_hidden.dtype), (grad_head * factor).to(ctx.head_dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Weighted sum of ``-log softmax(hidden @ head.T)[labels]``.

    Args:
        hidden: ``[tokens, d]``, any floating dtype.
        head: ``[vocabulary, d]``, the same dtype.
        labels: ``[tokens]`` int64, each below ``vocabulary``.
        weights: ``[tokens]`` float32, the weight of each token in the sum.
        chunk: tokens whose logits are in memory at a time.

    Returns:
        The weighted sum (float32, differentiable in `hidden` and `head`), and the ``[tokens]`` float32 losses
        without weights, for the log.
    """
    return _LinearCrossEntropy.apply(hidden, head, labels, weights, chunk)  # type: ignore[no-any-return, no-untyped-call]
