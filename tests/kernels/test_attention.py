"""Masked attention against the dense float32 reference, and the mask against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.kernels import attention
from lbr_dist.kernels.attention import BOTTLENECK, CONTEXT, SINK, TARGET, bottleneck_mask, reference_attention

lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4)


@given(lengths, st.sampled_from([None, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_mask_is_its_definition(sequences: list[tuple[int, int, int]], window: int | None) -> None:
    segments: list[int] = []
    roles: list[int] = []
    for i, (n, k, m) in enumerate(sequences):
        roles += [SINK] + [CONTEXT] * n + [BOTTLENECK] * k + [TARGET] * m
        segments += [i] * (1 + n + k + m)
    mask = bottleneck_mask(torch.tensor([segments]), torch.tensor([roles]), window)[0, 0]
    for q in range(len(roles)):
        for key in range(len(roles)):
            expected = segments[q] == segments[key] and key <= q
            expected &= not (roles[q] == TARGET and roles[key] == CONTEXT)
            expected &= window is None or q - key < window
            assert mask[q, key] == expected, (q, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "dim"), [(4, 4, 7, 8), (9, 3, 33, 64), (4, 1, 130, 24)])
@pytest.mark.parametrize("way", ["dense", "sdpa"])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, way: str, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "DENSE_ROW_TOKENS", 10**6 if way == "dense" else 0)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, h, tokens, dim, generator=generator).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    segments = (torch.arange(tokens) // 11).repeat(2, 1)
    roles = torch.randint(0, 4, (2, tokens), generator=generator)
    mask = bottleneck_mask(segments, roles)
    weight = torch.randn(2, heads, tokens, dim, generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = _truth(*exact, mask)
    (truth * weight).sum().backward()
    outputs = {}
    for name, function in (("ours", attention.masked_attention), ("reference", reference_attention)):
        output = function(q, k, v, mask, dim**-0.5)
        grads = torch.autograd.grad((output.float() * weight).sum(), (q, k, v))
        outputs[name] = [output, *grads]
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(outputs["ours"], [truth, *(x.grad for x in exact)], strict=True):
        assert expected is not None
        assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()


def _truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
