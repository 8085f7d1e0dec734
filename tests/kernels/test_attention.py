"""Every backend against the definition in float64: outputs and gradients, at odd shapes, with and without windows.

Tolerance: at most twice the error of plain PyTorch attention in the same precision under the dense mask, plus one unit
in the last place of the largest element.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.kernels import attention, causal_tiles
from lbr_dist.kernels.attention import KERNELS, bottleneck_attention, choose_backend, reference_attention, why_not
from lbr_dist.kernels.layout import BottleneckLayout

CUDA_ONLY = ("flash_attn", "torch_varlen")
LAYOUTS = {
    "odd": BottleneckLayout.from_lengths(context=[5, 1, 33, 7, 1], bottleneck=3, target=[6, 0, 28, 1, 3], sink=1),
    "long": BottleneckLayout.from_lengths(context=[560, 130], bottleneck=8, target=[150, 5], sink=1),
    "no sink": BottleneckLayout.from_lengths(context=[9, 0, 4], bottleneck=2, target=[4, 5, 0]),
    "no target": BottleneckLayout.from_lengths(context=[17, 40, 1], bottleneck=4, target=[0, 0, 0], sink=1),
    "no bottleneck": BottleneckLayout.from_lengths(context=[17, 40], bottleneck=0, target=[3, 0], sink=1),
    "one token": BottleneckLayout.from_lengths(context=[1], bottleneck=0, target=[0]),
}
lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


def made(layout: BottleneckLayout, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> list[Any]:
    """q, k, v with gradients, and a gradient for the output; the same numbers for every device."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(layout.tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The usual attention, in the dtype of the inputs; the softmax in float32 or wider."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=wide).to(q.dtype) @ v).transpose(0, 1)


def check(backend: str, name: str, shape: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    layout = LAYOUTS[name]
    device = "cuda" if backend in CUDA_ONLY else "cpu"
    q, k, v, grad = made(layout, *shape, dtype, device)
    mask = layout.mask(window).to(device)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = plain(*exact, mask)
    expected = [truth, *torch.autograd.grad(truth, exact, grad.double())]
    same = plain(q, k, v, mask)
    usual = [same, *torch.autograd.grad(same, (q, k, v), grad)]
    output = bottleneck_attention(q, k, v, layout, window=window, backend=backend)  # type: ignore[arg-type]
    found = [output, *torch.autograd.grad(output, (q, k, v), grad)]
    for ours, other, right in zip(found, usual, expected, strict=True):
        assert ours.dtype == dtype
        place = torch.finfo(dtype).eps * max(1.0, float(right.detach().abs().max()))  # the inputs' variance is one
        # torch's own fused kernel rounds more: by several units in the last place in float32
        allowed = 2 * (other.double() - right).abs().max() + place * (32 if backend == "sdpa" else 1)
        assert (ours.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "long"])
@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_backends_match_the_definition(backend: str, name: str, dtype: torch.dtype, window: int | None) -> None:
    for shape in ((4, 4, 8), (9, 3, 64), (4, 1, 24)):
        check(backend, name, shape, dtype, window)


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["tiles", "sdpa"])
def test_long_segments(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, window: int | None) -> None:
    """Several tiles, and probabilities that are recomputed in backward."""
    monkeypatch.setattr(causal_tiles, "KEPT_KEYS", 200)
    check(backend, "long", (4, 2, 32), dtype, window)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6, 200])
@pytest.mark.parametrize("backend", CUDA_ONLY)
def test_flash_backends_match_the_definition(backend: str, window: int | None) -> None:
    reason = why_not(backend, "cuda", torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)
    for name in LAYOUTS:
        for shape in ((4, 4, 8), (9, 3, 64)):
            check(backend, name, shape, torch.bfloat16, window)


@given(lengths, st.integers(0, 3), st.integers(0, 1), st.sampled_from([None, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_any_layout_matches_the_reference(
    sequences: list[tuple[int, int]], bottleneck: int, sink: int, window: int | None
) -> None:
    contexts, targets = zip(*sequences, strict=True)
    layout = BottleneckLayout.from_lengths(context=contexts, bottleneck=bottleneck, target=targets, sink=sink)
    q, k, v, _ = made(layout, 2, 1, 4, torch.float64, "cpu")
    expected = reference_attention(q, k, v, layout, 0.5, window)
    for backend in ("tiles", "sdpa"):
        found = bottleneck_attention(q, k, v, layout, window=window, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


@given(lengths, st.integers(1, 3), st.integers(0, 1), st.sampled_from([None, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_the_mask_matches_its_definition(
    sequences: list[tuple[int, int]], bottleneck: int, sink: int, window: int | None
) -> None:
    contexts, targets = zip(*sequences, strict=True)
    layout = BottleneckLayout.from_lengths(context=contexts, bottleneck=bottleneck, target=targets, sink=sink)
    mask = layout.mask(window)
    # for each token: its sequence, its position, its role, and the length of the sequence's context
    tokens = [
        (i, place, "target" if place >= n + bottleneck else "bottleneck" if place >= n else "context", n)
        for i, (n, m) in enumerate(sequences)
        for place in range(n + bottleneck + m)
    ]
    for q, (i, a, role, n) in enumerate(tokens):
        for key, (j, b, key_role, _) in enumerate(tokens):
            expected = i == j and b <= a
            distance = a - b
            if role == "target" and key_role == "context":
                expected &= b < sink
                distance -= n - sink
            expected &= window is None or distance < window
            assert mask[q, key] == expected, (tokens[q], tokens[key])


def test_the_target_sees_the_text_only_through_the_bottleneck() -> None:
    """With the bottleneck's keys and values fixed, another text must not change the target's outputs by one bit."""
    layout = BottleneckLayout.from_lengths(context=[7, 12], bottleneck=3, target=[5, 40], sink=1)
    q, k, v, _ = (x.detach() for x in made(layout, 4, 2, 16, torch.float32, "cpu"))
    others = [x.clone() for x in (q, k, v)]
    text = torch.zeros(layout.tokens, dtype=torch.bool)
    text[1:7] = text[7 + 3 + 5 + 1 : 7 + 3 + 5 + 12] = True
    target = torch.zeros(layout.tokens, dtype=torch.bool)
    target[10:15] = target[-40:] = True
    for x in others:
        x[text] = torch.randn(int(text.sum()), *x.shape[1:])
    for backend in ("tiles", "sdpa", "reference"):
        before, after = (bottleneck_attention(*x, layout, backend=backend) for x in ((q, k, v), others))  # type: ignore[arg-type]
        assert torch.equal(before[target], after[target])
        assert not torch.equal(before[~target], after[~target])


def test_invalid_inputs_are_refused() -> None:
    layout = BottleneckLayout.from_lengths(context=[4], bottleneck=1, target=[2])
    q, k, v, _ = made(layout, 4, 2, 8, torch.float32, "cpu")
    for message, arguments, options in (
        ("lengths sum to 7 tokens, q has 6", (q[:6], k[:6], v[:6]), {}),
        (r"found shapes \(7, 4, 8\), \(7, 2, 8\), \(6, 2, 8\)", (q, k, v[:6]), {}),
        ("found 3 heads, expected a multiple of the 2", (q[:, :3], k, v), {}),
        ("expected one dtype", (q, k.double(), v), {}),
        ("window: found 0", (q, k, v), {"window": 0}),
        ("'flash': found|found 'flash', expected one of auto", (q, k, v), {"backend": "flash"}),
        ("'torch_varlen': it needs CUDA, the tensors are on 'cpu'", (q, k, v), {"backend": "torch_varlen"}),
    ):
        with pytest.raises(ValueError, match=message):
            bottleneck_attention(*arguments, layout, **options)
    for message, lengths in (
        ("2 context lengths and 1 target lengths", {"context": [1, 2], "bottleneck": 1, "target": [1]}),
        ("negative length", {"context": [1], "bottleneck": 1, "target": [-1]}),
        ("shorter than the sink of 2", {"context": [1], "bottleneck": 1, "target": [1], "sink": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            BottleneckLayout.from_lengths(**lengths)  # type: ignore[arg-type]


def test_backends_say_why_not() -> None:
    assert "steps of 8, found 20" in str(why_not("torch_varlen", "cuda", torch.bfloat16, 20))
    assert "tensors are float32" in str(why_not("torch_varlen", "cuda", torch.float32, 64))
    assert "it runs on the CPU only" in str(why_not("tiles", "cuda", torch.bfloat16, 64))
    assert choose_backend("auto", "cuda", torch.bfloat16, 64) in CUDA_ONLY
    assert choose_backend("auto", "cuda", torch.float32, 64) == "sdpa"
    assert choose_backend("auto", "cpu", torch.bfloat16, 64) == "tiles"
    assert list(KERNELS)[-1] == "reference", "the slow reference is the last resort"


def test_fewer_key_heads_are_named_only_to_a_kernel_that_asks() -> None:
    """torch 2.11's `varlen_attn` has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    assert attention._takes_enable_gqa(varlen_attn)  # the pinned torch
    assert not attention._takes_enable_gqa(lambda query, key, value, *, scale=None, window_size=(-1, -1): query)
