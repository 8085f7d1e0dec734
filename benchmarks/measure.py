"""What the benchmarks share: starting ranks, fair timing of several methods in one run, a results file for each."""

from __future__ import annotations

import ctypes.util
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def machine() -> dict[str, Any]:
    """Hardware, versions and date of a result."""
    names = ("torch", "deepspeed", "transformers")
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), **versions, "date": str(datetime.date.today())}


def medians(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each method. They take turns, so that a slow moment of the machine affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if run:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def status_bytes(field: str) -> int:
    """The memory of this process: `VmRSS`, what it uses now, or `VmHWM`, the most it has used.

    Not ru_maxrss, which a child inherits from its parent.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def print_result(rank: int, **values: object) -> None:
    """Print what a rank has measured, as the one line that `run_ranks` looks for."""
    sys.stdout.write(json.dumps({"rank": rank, **values}) + "\n")
    sys.stdout.flush()


def run_ranks(script: Path, *arguments: str, ranks: int) -> list[dict[str, Any]]:
    """Run a script on ranks of one thread each, with the allocator that our launcher preloads; returns their results.

    A rank prints its result as a JSON object that starts with `rank`. Scripts can import this module.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": path} | ({"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"} if library else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    if done.returncode or len(lines) != ranks:
        raise SystemExit(f"{script.name} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return lines


def record(benchmark: str, row: Mapping[str, Any]) -> None:
    """Append a result with hardware, versions and date to ``results/BENCHMARK.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**row, **machine()}) + "\n")
