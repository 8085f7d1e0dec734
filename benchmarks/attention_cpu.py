"""Masked attention on a CPU: plain matrix products against SDPA with the same mask, by row length.

    python benchmarks/attention_cpu.py

About 2,048 tokens in rows of each length, 9 heads over 3 key-value heads of 64, bfloat16; medians of 9 runs, the two
in turn. `DENSE_ROW_TOKENS` in kernels/attention.py is read off this. Appends to benchmarks/results/.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from baselines import machine

from lbr_dist.kernels import attention

RESULTS = Path(__file__).parent / "results" / "attention_cpu.jsonl"
TOKENS, HEADS, KV_HEADS, DIM, RUNS = 2048, 9, 3, 64, 9


def seconds(row_tokens: int, dense: bool) -> float:
    """Forward and backward of one layer's attention."""
    rows = max(1, TOKENS // row_tokens)
    q, k, v = (
        torch.randn(rows, heads, row_tokens, DIM, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    segments = (torch.arange(row_tokens) // 50).repeat(rows, 1)
    mask = attention.bottleneck_mask(segments, torch.ones_like(segments))
    attention.DENSE_ROW_TOKENS = 10**9 if dense else 0
    began = time.perf_counter()
    attention.masked_attention(q, k, v, mask, DIM**-0.5).sum().backward()
    return time.perf_counter() - began


def main() -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    print(f"{'row tokens':>10}{'dense ms':>10}{'sdpa ms':>10}{'dense / sdpa':>14}")
    for row_tokens in (64, 128, 160, 192, 256, 512, 1024):
        times: dict[bool, list[float]] = {True: [], False: []}
        for run in range(RUNS + 1):
            for dense in (True, False):
                taken = seconds(row_tokens, dense)
                if run:  # the first one warms up
                    times[dense].append(taken)
        ours, theirs = (statistics.median(times[dense]) * 1e3 for dense in (True, False))
        print(f"{row_tokens:>10}{ours:>10.1f}{theirs:>10.1f}{ours / theirs:>14.2f}")
        row = {"row_tokens": row_tokens, "dense_ms": round(ours, 2), "sdpa_ms": round(theirs, 2)}
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**row, "ratio": round(ours / theirs, 3), **machine()}) + "\n")


if __name__ == "__main__":
    main()
