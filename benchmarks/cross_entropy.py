"""Cross-entropy with the LM head: ours, one chunk of logits at a time, compared with the plain loss.

    python benchmarks/cross_entropy.py

Forward and backward of 8,192 tokens over a vocabulary of 49,152, d = 576, bfloat16, two threads, loss and both
gradients. `plain` is `F.cross_entropy(hidden @ head.T)`, in float32 as in transformers. Peak extra memory is the
process's high-water mark above the memory in use before, each method in its own process. The target: at most 0.15 of
the memory in at most 1.1 of the time. Appends to benchmarks/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import medians, record, status_bytes

from lbr_dist.kernels.cross_entropy import CHUNK, linear_cross_entropy

TOKENS, VOCABULARY, DIM, THREADS, RUNS = 8192, 49152, 576, 2, 3


def ways() -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    hidden = torch.randn(TOKENS, DIM).bfloat16().requires_grad_()
    head = (0.02 * torch.randn(VOCABULARY, DIM)).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    groups, weights = torch.randint(0, 2, (TOKENS,)), torch.full((2,), 1.0 / TOKENS)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy((hidden @ head.T).float(), labels), (hidden, head))

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, head, labels, groups, weights)[0], (hidden, head))

    return {"ours": ours, "plain": plain}


def extra_bytes(way: str) -> int:
    """In this process: the peak above the memory in use before."""
    run = ways()[way]
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(extra_bytes(sys.argv[1])))
        return
    taken = medians(ways(), RUNS)
    memory = {}
    for way in taken:
        done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
        memory[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:<7}{taken[way]:>8.2f} s{memory[way] / 2**20:>10.0f} MiB extra")
    time_ratio, memory_ratio = taken["ours"] / taken["plain"], memory["ours"] / memory["plain"]
    print(f"ours takes {time_ratio:.2f} of the time and {memory_ratio:.3f} of the extra memory")
    row = {"tokens": TOKENS, "vocabulary": VOCABULARY, "d": DIM, "dtype": "bfloat16", "threads": THREADS}
    row |= {"chunk": CHUNK, "time_ratio": round(time_ratio, 3), "memory_ratio": round(memory_ratio, 4)}
    for way in taken:
        row |= {f"{way}_seconds": round(taken[way], 3), f"{way}_extra_mib": round(memory[way] / 2**20, 1)}
    record("cross_entropy", row)


if __name__ == "__main__":
    main()
