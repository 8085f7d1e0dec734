"""`lbr versions`: what a bug report needs to say about the software and the machine. Imports no torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

from lbr_dist import __version__
from lbr_dist.console import Say, size_text
from lbr_dist.launch.doctor.findings import ask
from lbr_dist.ranks.hardware import count_gpus, fitting_dtype, memory

BESIDE = ("triton", "flash-attn", "liger-kernel", "mpi4py", "faiss-cpu", "tensorboard")
"""Packages that are used if they are there."""


def run(args: argparse.Namespace, say: Say) -> None:
    """Print a line for each thing."""
    for name, found in (*_machine(), *_packages()):
        say(f"{name:<24}{found}")


def _machine() -> Iterator[tuple[str, str]]:
    yield "lbr-dist", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    cores, gpus = len(os.sched_getaffinity(0)), count_gpus()
    yield "machine", f"{cores} cores, {size_text(memory()[1])}, {gpus} GPUs, model.dtype auto: {fitting_dtype(gpus)}"
    for name, command in (
        ("nvidia driver", ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")),
        ("slurm", ("sinfo", "--version")),
        ("mpi", ("mpirun", "--version")),
    ):
        answer = ask(*command)
        lines = answer.text.strip().splitlines()
        yield name, "not found" if answer.missing else lines[0] if lines else str(answer.failure)


def _packages() -> Iterator[tuple[str, str]]:
    try:
        required = importlib.metadata.requires("lbr-dist") or []
    except importlib.metadata.PackageNotFoundError:
        required = ["torch", "transformers", "deepspeed"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    for name in (*names, *BESIDE):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
