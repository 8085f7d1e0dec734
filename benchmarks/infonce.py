"""InfoNCE: ours, one tile of similarities at a time, compared with the dense loss.

    python benchmarks/infonce.py            # 4,096 and 16,384 pairs, both methods
    python benchmarks/infonce.py large      # 131,072 pairs, only ours, about ten minutes

Forward and backward with as many queries as documents, d = 576, float32, two threads, loss and both gradients. `dense`
is `F.cross_entropy(F.normalize(queries) @ F.normalize(documents).T / temperature, positives)`. Peak extra memory is the
process's high-water mark above the memory in use before, including the two gradients, each method in its own process.
The targets: at most 1.1 of the dense time at 16,384, and at 131,072 less than 1 % of the 64 GiB of the dense matrix.
Appends to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# before torch: on a busy machine, threads that spin while waiting take the cores from the threads they wait for
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from measure import medians, record
from torch import Tensor

from lbr_dist.kernels import infonce_tiles
from lbr_dist.kernels.infonce import info_nce

SIZES, LARGE, DIM, TEMPERATURE, THREADS, RUNS = (4096, 16384), 131072, 576, 0.05, 2, 3


def ways(size: int) -> dict[str, Callable[[], Tensor]]:
    """Each returns the loss, after it has computed the gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    queries, documents = (torch.randn(size, DIM).requires_grad_() for _ in range(2))
    positives = torch.randperm(size)

    def dense() -> Tensor:
        scores = F.normalize(queries) @ F.normalize(documents).T / TEMPERATURE
        loss = F.cross_entropy(scores, positives, reduction="sum")
        torch.autograd.grad(loss, (queries, documents))
        return loss.detach()

    def ours() -> Tensor:
        loss = info_nce(queries, documents, positives, temperature=TEMPERATURE, backend="tiles").loss
        torch.autograd.grad(loss, (queries, documents))
        return loss.detach()

    return {"ours": ours, "dense": dense}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def in_a_process(way: str, size: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, way, str(size)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_run(way: str, size: int) -> dict[str, float]:
    """In this process: seconds, loss, and the peak above the memory in use before."""
    run = ways(size)[way]
    before, began = status_bytes("VmRSS"), time.perf_counter()
    loss = float(run())
    seconds = time.perf_counter() - began
    # not ru_maxrss, which a child inherits from its parent
    return {"seconds": seconds, "extra_bytes": status_bytes("VmHWM") - before, "loss": loss}


def show_progress(size: int) -> None:
    """Print a line for every sixteenth of the rows in each pass."""
    tiles, began, done = infonce_tiles._tiles, time.perf_counter(), [0]

    def told(problem: infonce_tiles.Problem):  # type: ignore[no-untyped-def]
        for tile in tiles(problem):
            yield tile
            if tile[1].stop == size and tile[0].stop % (size // 16) == 0:
                done[0] += 1
                taken = time.perf_counter() - began
                print(f"{done[0]}/32 of both passes after {taken:.0f} s", file=sys.stderr, flush=True)

    infonce_tiles._tiles = told


def main() -> None:
    row = {"d": DIM, "dtype": "float32", "threads": THREADS, "tile": infonce_tiles.TILE}
    if len(sys.argv) > 2:
        way, size = sys.argv[1], int(sys.argv[2])
        if size == LARGE:
            show_progress(size)
        print(json.dumps(one_run(way, size)))
    elif sys.argv[1:] == ["large"]:
        found = in_a_process("ours", LARGE)
        share = found["extra_bytes"] / (4 * LARGE**2)
        seconds, megabytes = found["seconds"], found["extra_bytes"] / 1e6
        print(f"{LARGE:,} pairs: {seconds:.0f} s, {megabytes:.0f} MB extra, {share:.2%} of the dense matrix")
        row |= {"pairs": LARGE, "ours_seconds": round(seconds, 1), "ours_loss": found["loss"]}
        row |= {"ours_extra_mib": round(found["extra_bytes"] / 2**20, 1), "share_of_dense_matrix": round(share, 5)}
        record("infonce", row)
    else:
        for size in SIZES:
            taken = medians(ways(size), RUNS)
            found_by = {way: in_a_process(way, size) for way in taken}
            result = row | {"pairs": size, "time_ratio": round(taken["ours"] / taken["dense"], 3)}
            for way, found in found_by.items():
                mib = found["extra_bytes"] / 2**20
                print(f"{size:>7,} pairs  {way:<6}{taken[way]:>8.2f} s{mib:>10.0f} MiB extra, loss {found['loss']:.4f}")
                result |= {f"{way}_seconds": round(taken[way], 3), f"{way}_extra_mib": round(mib, 1)}
                result |= {f"{way}_loss": found["loss"]}
            print(f"ours takes {result['time_ratio']:.2f} of the time")
            record("infonce", result)


if __name__ == "__main__":
    main()
