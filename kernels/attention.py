"""Attention over packed rows with a bottleneck, without a mask: two plain causal attentions (see `layout`).

One function for both stages and every device. The backends compute the same thing:

    flash_attn    the flash-attn package; CUDA, half precision
    torch_varlen  torch's built-in flash attention for packed rows; CUDA, half precision
    tiles         matrix products over causal tiles; CPU only
    sdpa          torch's scaled_dot_product_attention, stack by stack; for everything else
    reference     the dense mask in float32: slow, and what the others must match
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.kernels.causal_tiles import causal_tiles, stacks
from lbr_dist.kernels.layout import BottleneckLayout

Backend = Literal["auto", "flash_attn", "torch_varlen", "tiles", "sdpa", "reference"]
Kernel = Callable[[Tensor, Tensor, Tensor, BottleneckLayout, float, int | None], Tensor]

FLASH_HEAD_DIM = 256


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BottleneckLayout, scale: float, window: int | None
) -> Tensor:
    """Attention in float32 or wider, under the dense mask that defines the layout; what every backend must match."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1).transpose(0, 1) for x in (key, value))
    scores = (query.to(wide).transpose(0, 1) @ k.transpose(1, 2)) * scale  # [heads, tokens, tokens]
    mask = layout.mask(window).to(query.device)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def _flash_window(window: int | None) -> tuple[int, int]:
    return (-1 if window is None else window - 1, 0)


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, layout: BottleneckLayout, scale: float, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest_query, longest_key = layout.longest
    output: Tensor = flash_attn_varlen_func(
        query,
        key.index_select(0, layout.key_index),
        value.index_select(0, layout.key_index),
        cu_seqlens_q=layout.cu_queries,
        cu_seqlens_k=layout.cu_keys,
        max_seqlen_q=longest_query,
        max_seqlen_k=longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=_flash_window(window),
    )
    return output


@functools.cache
def _takes_enable_gqa(kernel: Callable[..., object]) -> bool:
    """Whether `varlen_attn` has the argument `enable_gqa`; torch 2.11's has not, and accepts fewer key heads anyway."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: BottleneckLayout, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _takes_enable_gqa(varlen_attn) else {}
    longest_query, longest_key = layout.longest
    output = varlen_attn(
        query,
        key.index_select(0, layout.key_index),
        value.index_select(0, layout.key_index),
        layout.cu_queries,
        layout.cu_keys,
        longest_query,
        longest_key,
        scale=scale,
        window_size=_flash_window(window),
        **options,
    )
    assert isinstance(output, Tensor)
    return output


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: BottleneckLayout, scale: float, window: int | None
) -> Tensor:
    """SDPA stack by stack, with a query for every key, since SDPA's causal diagonal starts at the top left.

    The outputs of the extra queries (the sink and the bottleneck, a second time) are dropped.
    """
    output = torch.zeros_like(query)
    for stack in stacks(layout):
        index = stack.key_index.to(query.device)
        q, k, v = (x[index].view(stack.segments, stack.keys, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        if window is None:
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        else:
            place = torch.arange(stack.keys, device=query.device)
            back = place[:, None] - place[None, :]
            seen = (back >= 0) & (back < window)
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        rows = result.transpose(1, 2)[:, stack.offset :].reshape(-1, *query.shape[1:])
        real = stack.real.to(query.device)
        output = output.index_put((stack.query_index.to(query.device)[real],), rows[real])
    return output


KERNELS: dict[str, Kernel] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "tiles": causal_tiles,
    "sdpa": _sdpa,
    "reference": reference_attention,
}


def why_not(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run such inputs, in words, or None if it can."""
    if backend in ("flash_attn", "torch_varlen"):
        if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
        if device != "cuda":
            return f"it needs CUDA, the tensors are on {device!r}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, the tensors are {str(dtype).removeprefix('torch.')}"
        if head_dim > FLASH_HEAD_DIM or head_dim % 8:
            return f"it needs a head_dim of up to {FLASH_HEAD_DIM} in steps of 8, found {head_dim}"
    if backend == "tiles" and device != "cpu":
        return f"it runs on the CPU only, the tensors are on {device!r}"
    return None


def choose_backend(backend: Backend, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend to run: the one asked for, or, with `auto`, the fastest that can run such inputs.

    Raises:
        ValueError: the backend asked for by name cannot run them.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend: found {backend!r}, expected one of {', '.join(get_args(Backend))}")
    if backend != "auto":
        reason = why_not(backend, device, dtype, head_dim)
        if reason is not None:
            raise ValueError(f"attention backend {backend!r}: {reason}. Use `auto`, or another backend.")
        return backend
    return next(b for b in KERNELS if why_not(b, device, dtype, head_dim) is None)


def bottleneck_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BottleneckLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of packed sequences ``[x b y]`` in which y sees only b and y.

    Args:
        q: ``[tokens, heads, head_dim]``, float32, bfloat16 or float16.
        k: ``[tokens, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        v: the same shape as `k`.
        layout: the sequences of the row; its lengths sum to ``tokens``.
        scale: the scores' factor; ``head_dim ** -0.5`` by default.
        window: sliding window of a query in tokens, itself included; see `BottleneckLayout.mask`.
        backend: which kernel; see the top of this module.

    Returns:
        ``[tokens, heads, head_dim]`` in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes don't match each other or the layout, or the backend cannot run them.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v: found shapes {shapes}, expected [tokens, heads, head_dim] for the same tokens")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: found {q.shape[1]} heads, expected a multiple of the {k.shape[1]} key-value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: found {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype")
    if layout.tokens != q.shape[0]:
        raise ValueError(f"layout: its lengths sum to {layout.tokens} tokens, q has {q.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window: found {window}, expected one token or more")
    chosen = choose_backend(backend, q.device.type, q.dtype, q.shape[2])
    if not layout.segments:
        return torch.zeros_like(q)
    return KERNELS[chosen](q, k, v, layout.to(q.device), q.shape[2] ** -0.5 if scale is None else scale, window)
