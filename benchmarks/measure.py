"""What the benchmarks share: fair timing of several ways in one run, and a results file a benchmark."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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
    """Median seconds of each way. They take turns, so that a slow moment of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if run:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def record(benchmark: str, row: Mapping[str, Any]) -> None:
    """Append a result with hardware, versions and date to ``results/BENCHMARK.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**row, **machine()}) + "\n")
