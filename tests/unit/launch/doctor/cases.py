"""`lbr doctor` in its own process, and machines with faults for it to find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def script(folder: Path, name: str, text: str) -> Path:
    """Write a shell script into a folder, which a test puts on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return folder


def mounted(*commands: str) -> list[str]:
    """The start of a command line: what follows runs with these mounts, which no other process sees."""
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    steps = " && ".join([*commands, 'exec "$@"'])
    return ["unshare", *user, "--mount", "--propagation", "private", "sh", "-c", steps, "sh"]


def two_gpus(folder: Path) -> list[str]:
    """The same, for a /dev with the file names of two GPUs, and 32 MiB of shared memory."""
    nodes = [f"touch {folder}/{name} && mount --bind /dev/{name} {folder}/{name}" for name in ("null", "urandom")]
    return mounted(
        f"mkdir {folder}",
        f"mount -t tmpfs tmpfs {folder}",
        *nodes,
        f"touch {folder}/nvidia0 {folder}/nvidia1 {folder}/nvidiactl",
        f"mkdir {folder}/shm && mount -t tmpfs -o size=32m tmpfs {folder}/shm",
        f"mount --rbind {folder} /dev",
    )


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, without what a job or a cluster set, and with changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLOO"))}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {name: value for name, value in (kept | changes).items() if value is not None}


def lbr(
    *arguments: str, before: Sequence[str] = (), code: str = "", **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Run `lbr doctor` in its own process, after some code. A traceback fails the test."""
    start = ["-c", f"{code}; import sys; from lbr_dist.launch.cli import main; sys.exit(main())"]
    command = [*before, sys.executable, *(start if code else ["-m", "lbr_dist.launch.cli"]), "doctor", *arguments]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def states(findings: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {finding["name"]: finding["state"] for finding in findings}
