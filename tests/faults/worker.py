"""A rank with a fault: the real worker, in which something goes wrong once, at a named point.

``LBR_FAULT`` describes the fault as JSON: ``rank``, ``point``, and the point's arguments. Everything else is real.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from lbr_dist.launch import worker
from lbr_dist.ranks.process import large_imports, leave

with large_imports():
    from lbr_dist.checkpoint import manifest, shards
    from lbr_dist.engine import Engine
    from lbr_dist.ranks import interrupt

VARIABLE = "LBR_FAULT"


def _send(name: str, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))


def _mid_shard(step: int, **_: Any) -> None:
    """Killed when a step's file is partly written."""
    original, written = shards.write_chunk, 0

    def write_chunk(stream: Any, chunk: memoryview) -> None:
        nonlocal written
        written += manifest.tag(step) in stream.name
        if written == 5:
            original(stream, chunk[: len(chunk) // 2])
            _send("SIGKILL")
        original(stream, chunk)

    shards.write_chunk = write_chunk


def _around(module: Any, name: str, step: int, before: Callable[[], None], after: Callable[[], None]) -> None:
    original = getattr(module, name)

    def call(place: Any, found: manifest.Manifest) -> None:
        if found.step == step:
            before()
        original(place, found)
        if found.step == step:
            after()

    setattr(module, name, call)


def _nothing() -> None:
    pass


def _before_manifest(step: int, **_: Any) -> None:
    """Killed when all shards are on disk but the manifest is not."""
    _around(manifest, "write_manifest", step, lambda: _send("SIGKILL"), _nothing)


def _before_rename(step: int, **_: Any) -> None:
    """Killed when the manifest is on disk but the checkpoint has not been renamed."""
    _around(manifest, "write_manifest", step, _nothing, lambda: _send("SIGKILL"))


def _before_pointer(step: int, **_: Any) -> None:
    """Killed when the checkpoint has been renamed but the pointer is still the old one."""
    _around(manifest, "move_pointer", step, lambda: _send("SIGKILL"), _nothing)


def _in_save(step: int, act: Callable[[], None]) -> None:
    original = shards.write

    def write(path: Any, tensors: Any, notes: Any) -> shards.Written:
        if manifest.tag(step) in str(path):
            act()
        return original(path, tensors, notes)

    shards.write = write


def _in_backward(call: int, act: Callable[[], Any], ever_since: bool = False) -> None:
    original, calls = Engine.backward, 0

    def backward(self: Engine, loss: Any) -> None:
        nonlocal calls
        calls += 1
        factor = act() if calls == call or (ever_since and calls > call) else None
        original(self, loss if factor is None else loss * factor)

    Engine.backward = backward  # type: ignore[method-assign]


def _read_only(step: int, mount: str) -> None:
    original = manifest.Checkpoints.begin

    def begin(self: manifest.Checkpoints, of: int) -> None:
        if of == step:
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        original(self, of)

    manifest.Checkpoints.begin = begin  # type: ignore[method-assign]


def _held_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, PyDLL keeps the interpreter's lock


POINTS: dict[str, Callable[..., None]] = {
    "mid_shard": _mid_shard,
    "before_manifest": _before_manifest,
    "before_rename": _before_rename,
    "before_pointer": _before_pointer,
    "slow_disk": lambda step, seconds, **_: _in_save(step, lambda: time.sleep(seconds)),
    "signals_in_save": lambda step, name, **_: _in_save(step, lambda: _send(name, 2)),
    "signals_in_backward": lambda call, name, **_: _in_backward(call, lambda: _send(name, 2)),
    "killed_in_backward": lambda call, **_: _in_backward(call, lambda: _send("SIGKILL")),
    "hangs": lambda call, **_: _in_backward(call, lambda: time.sleep(1000)),
    "hangs_in_c": lambda call, **_: _in_backward(call, _held_interpreter),
    "stopped": lambda call, **_: _in_backward(call, lambda: _send("SIGSTOP")),
    "limit_ahead": lambda call, **_: _in_backward(call, lambda: setattr(interrupt, "seconds_left", lambda: 0.001)),
    "not_a_number": lambda call, **_: _in_backward(call, lambda: float("nan")),
    "not_a_number_any_more": lambda call, **_: _in_backward(call, lambda: float("nan"), ever_since=True),
    "no_look_at_the_space": lambda **_: setattr(manifest, "free_bytes", lambda path: 1 << 60),
    "read_only_from": lambda step, mount, **_: _read_only(step, mount),
}


if __name__ == "__main__":
    fault = json.loads(os.environ.get(VARIABLE, "null"))
    if fault is not None and os.environ["RANK"] == str(fault.pop("rank")):
        POINTS[fault.pop("point")](**fault)
    leave(worker.main())
