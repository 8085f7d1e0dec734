"""Attention through a bottleneck on one CPU thread: our packed form against dense masks and plain causal attention.

    python benchmarks/attention.py

Forward and backward of one layer. `dense` is SDPA with the bottleneck's mask, padded to the longest if lengths differ;
`causal` is plain causal SDPA over the whole row, which also computes what the mask forbids; `two sdpa` is the two
causal parts by SDPA. The target: at most 0.38 of dense and 0.65 of causal at 1,024 + 8 + 1,024 tokens of head_dim 64,
and at most 0.8 of dense for 64 short texts. Medians; the methods take turns. Appends to benchmarks/results/.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import medians, record

from lbr_dist.kernels.attention import bottleneck_attention
from lbr_dist.kernels.layout import BottleneckLayout

DIM, BOTTLENECK, RUNS = 64, 8, 11


def padded(rows: torch.Tensor, layout: BottleneckLayout) -> torch.Tensor:
    """``[sequences, heads, longest, dim]`` of packed ``[tokens, heads, dim]``."""
    lengths = [n + layout.bottleneck + m for n, m in zip(layout.context, layout.target, strict=True)]
    parts = rows.detach().split(lengths)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous().requires_grad_()


def compare(name: str, contexts: list[int], targets: list[int], heads: tuple[int, int], dtype: torch.dtype) -> None:
    layout = BottleneckLayout.from_lengths(context=contexts, bottleneck=BOTTLENECK, target=targets)
    packed = [torch.randn(layout.tokens, h, DIM).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])]
    gradient = torch.randn(layout.tokens, heads[0], DIM).to(dtype)
    batch = [padded(x, layout) for x in packed]
    batch_gradient = padded(gradient, layout).detach()
    longest = batch[0].shape[2]
    mask = torch.zeros(len(contexts), 1, longest, longest, dtype=torch.bool)
    for i, (n, m) in enumerate(zip(contexts, targets, strict=True)):
        one = BottleneckLayout.from_lengths(context=[n], bottleneck=BOTTLENECK, target=[m]).mask()
        mask[i, 0] = torch.eye(longest, dtype=torch.bool)  # padding sees itself: no empty softmax
        mask[i, 0, : len(one), : len(one)] = one
    grouped = heads[0] != heads[1]

    def batched(**how: object) -> Callable[[], None]:
        def run() -> None:
            F.scaled_dot_product_attention(*batch, enable_gqa=grouped, **how).backward(batch_gradient)  # type: ignore[arg-type]

        return run

    def ours(backend: str) -> Callable[[], None]:
        def run() -> None:
            layout.prepared.clear()  # a step computes it once for all layers; here it is paid each time
            bottleneck_attention(*packed, layout, backend=backend).backward(gradient)  # type: ignore[arg-type]

        return run

    ways = {
        "ours": ours("tiles"),
        "two sdpa": ours("sdpa"),
        "dense": batched(attn_mask=mask),
        "causal": batched(is_causal=True),
    }
    taken = medians(ways, RUNS)
    ratios = {way: taken["ours"] / seconds for way, seconds in taken.items() if way != "ours"}
    shown = "".join(f"{taken[way] * 1e3:>11.1f}" for way in ways)
    print(f"{name:<34}{heads[0]}/{heads[1]} {str(dtype)[6:]:<9}{shown}", end="")
    print("".join(f"{ratio:>11.2f}" for ratio in ratios.values()))
    record(
        "attention",
        {"case": name, "heads": heads[0], "kv_heads": heads[1], "head_dim": DIM, "dtype": str(dtype)[6:], "threads": 1}
        | {f"{way.replace(' ', '_')}_ms": round(seconds * 1e3, 2) for way, seconds in taken.items()}
        | {f"of_{way.replace(' ', '_')}": round(ratio, 3) for way, ratio in ratios.items()},
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(0)
    short = [[rng.randint(20, 60) for _ in range(64)] for _ in range(2)]
    print(f"{'case':<34}{'heads':<13}{'ours ms':>11}{'two sdpa':>11}{'dense':>11}{'causal':>11}", end="")
    print(f"{'of two':>11}{'of dense':>11}{'of causal':>11}")
    for dtype in (torch.bfloat16, torch.float32):
        for heads in ((8, 8), (9, 3)):
            compare("2 x 1,024 + 8 + 1,024", [1024] * 2, [1024] * 2, heads, dtype)
            compare("64 texts of 20 to 60, both sides", short[0], short[1], heads, dtype)


if __name__ == "__main__":
    main()
