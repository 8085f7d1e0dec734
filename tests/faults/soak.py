"""A soak test: ranks are killed at random moments of a short run of both stages, which must end as if uninterrupted.

    python -m tests.faults.soak --kills 30

The ranks are forked from a process that has imported everything, so that a start takes one second instead of ten. They
run the launcher's own worker, and are killed by real signals.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import equal

from lbr_dist import learn, represent
from lbr_dist.checkpoint.manifest import SET_ASIDE
from lbr_dist.config import CheckpointConfig, RunConfig, StageName
from lbr_dist.config.file import write_config
from lbr_dist.launch import worker
from tests import tiny
from tests.configs import tiny_run
from tests.faults.runs import checkpoints, losses

__all__ = ["learn", "represent"]  # imported for the forked ranks

RANKS = 2
START = 3.0
"""A kill that does not wait for steps comes within this many seconds of the start."""
AHEAD = 5
"""Any other kill waits for at most this many new steps."""


def _fork(stage: StageName, config_path: Path, rank: int, folder: str, log: Path) -> int:
    process = os.fork()
    if process:
        return process
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "LBR_RENDEZVOUS": f"file://{folder}/rendezvous",
        "OMP_NUM_THREADS": "1",
    }
    sys.argv = ["worker", stage, str(config_path)]
    code = 1
    try:
        code = worker.main()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(
    stage: StageName, config: RunConfig, kill: Callable[[list[int]], None] | None, due: Callable[[], bool]
) -> bool:
    """Start the ranks, and kill some of them when a kill is due. Returns whether the stage ended before that."""
    log = config.run_path / f"{stage}.log"
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_fork(stage, config.run_path / "config.yaml", rank, folder, log) for rank in range(RANKS)]
        codes: dict[int, int] = {}
        while len(codes) < RANKS:
            for rank in ranks:
                if rank not in codes:
                    found, status = os.waitpid(rank, os.WNOHANG)
                    codes |= {rank: os.waitstatus_to_exitcode(status)} if found else {}
            if any(codes.values()) and len(codes) < RANKS:
                # a launcher does the same when a rank has died
                for rank in set(ranks) - codes.keys():
                    os.kill(rank, signal.SIGKILL)
            if kill is not None and not codes and due():
                kill(ranks)
                kill = None
            time.sleep(0.005)
    if not any(codes.values()):
        return True
    assert kill is None, f"the ranks exited by themselves, with {codes}: {log.read_text()[-3000:]}"
    return False


def reached(config: RunConfig, stage: StageName) -> int:
    """The last step of a stage that was logged."""
    path = config.stage_path(stage) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max(
        (int(line.split(",")[0].rpartition(" ")[2]) for line in lines if line.startswith('{"step": ')), default=0
    )


def moment(config: RunConfig, stage: StageName, generator: random.Random) -> Callable[[], bool]:
    """When the next kill is due: after a random time, or a random time after a random new step."""
    began = time.monotonic()
    if generator.random() < 0.3:
        seconds = generator.uniform(0.0, START)
        return lambda: time.monotonic() - began > seconds
    wanted, delay = reached(config, stage) + generator.randint(1, AHEAD), generator.uniform(0.0, 0.2)
    seen: list[float] = []

    def due() -> bool:
        if not seen and reached(config, stage) >= wanted:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > delay

    return due


def kill_one(generator: random.Random) -> tuple[str, Callable[[list[int]], None]]:
    """What to kill: one rank, all of them at once, or all of them after a SIGTERM to one."""
    name = generator.choice(["rank 0", "rank 1", "all", "SIGTERM, then killed"])

    def kill(ranks: list[int]) -> None:
        if name == "SIGTERM, then killed":
            os.kill(generator.choice(ranks), signal.SIGTERM)
            time.sleep(generator.uniform(0.0, 0.2))
        victims = {"rank 0": ranks[:1], "rank 1": ranks[1:]}.get(name, ranks)
        for rank in victims:
            os.kill(rank, signal.SIGKILL)

    return name, kill


def soak(kills: int, seed: int, folder: Path, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both stages twice, once without kills, and compare the results."""
    generator = random.Random(seed)
    base = tiny.write_model(folder / "base")
    tiny.write_data(folder / "data")
    reference = tiny_run(folder / "reference", base, folder / "data")
    settings = CheckpointConfig(every_steps=1, keep=2)
    reference = dataclasses.replace(
        reference,
        learn=dataclasses.replace(reference.learn, steps=steps),
        represent=dataclasses.replace(reference.represent, steps=steps),
        checkpoint=settings,
    )
    killed = dataclasses.replace(reference, run_dir=str(folder / "killed"))
    for config in (reference, killed):
        write_config(config, config.run_path / "config.yaml")
    stages: tuple[StageName, ...] = ("learn", "represent")
    began = time.monotonic()
    for stage in stages:
        assert attempt(stage, reference, None, lambda: False)
    seconds = time.monotonic() - began
    done, ways, lost = 0, Counter[str](), []
    for number, stage in enumerate(stages):
        share = kills * (number + 1) // len(stages)
        while True:
            name, kill = kill_one(generator)
            wanted = kill if done < share else None
            ended = attempt(stage, killed, wanted, moment(killed, stage, generator))
            if ended:
                assert done >= share, f"{stage} ended after {done} kills: give it more steps"
                break
            done += 1
            ways[name] += 1
            step, saved = reached(killed, stage), checkpoints(killed, stage).complete()
            lost.append(max(0, step - (saved[-1].step if saved else 0)))
            say(f"{stage}: kill {done} of {kills} ({name}) after step {step}, {lost[-1]} steps lost")
    for stage in stages:
        assert losses(killed, stage) == losses(reference, stage), f"{stage}: the losses differ"
        assert not (checkpoints(killed, stage).path / SET_ASIDE).exists(), f"{stage}: a damaged checkpoint"
    for name in ("learn/export", "model"):
        first, second = (load_file(c.run_path / name / "model.safetensors") for c in (reference, killed))
        assert first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first), name
    return {
        "kills": done,
        "ways": dict(ways),
        "steps_of_a_stage": steps,
        "steps_lost": {"in all": sum(lost), "at most": max(lost)},
        "damaged_checkpoints": 0,
        "seconds_in_peace": round(seconds, 1),
        "seconds": round(time.monotonic() - began - seconds, 1),
        "seed": seed,
        "weights_and_losses": "equal, bit for bit, to the uninterrupted run's",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="steps of each stage, with a checkpoint after each")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(args.kills, args.seed, Path(folder), args.steps, lambda text: print(text, flush=True))
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
