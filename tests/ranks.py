"""Runs functions on N real gloo ranks. One process group serves all tests of its size."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_SECONDS = 240

PRELOADED = ["lbr_dist.learn", "lbr_dist.represent", "tests.distributed.on_ranks", "tests.faults.on_ranks"]
"""Imported once by the fork server: otherwise each of 25 ranks spends seconds on these imports."""


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LBR_RENDEZVOUS": rendezvous,
        "OMP_NUM_THREADS": "1",
    }
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries

    ranks = group.start(timeout_minutes=3)
    quiet_libraries()
    while True:
        call = pipe.recv()
        if call is None:
            break
        function, arguments = call
        try:
            pipe.send((True, function(ranks, **arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    group.stop()
    os._exit(0)  # skip the libraries' shutdown, which takes seconds


class RankPool:
    """N processes in one process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="lbr-test-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            url = f"file://{self._folder.name}/rendezvous"
            process = context.Process(target=_serve, args=(rank, world_size, url, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call ``function(ranks, **arguments)`` on every rank; their results, in the order of the ranks."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(DEADLINE_SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} of {self.world_size} gave no answer in {DEADLINE_SECONDS} s")
            results.append(pipe.recv())
        for rank, (done, result) in enumerate(results):
            if not done:
                raise AssertionError(f"rank {rank} of {self.world_size}:\n{result}")
        return [result for _, result in results]

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + 10
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
            process.kill()
        self._folder.cleanup()
