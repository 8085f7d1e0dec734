"""What a checkpoint costs: the training stall, and how close saving, resuming and verifying come to the disk's speed.

    python benchmarks/checkpoints.py --base runs/base/smollm2-135m

SmolLM2-135M under ZeRO-3 on two ranks, after a step, so that all of the state exists: 12 bytes per parameter. Every
figure is a median over the turns; in each turn, every method runs once:

- *stall*: how long `Saver.save` blocks the training loop, writing in the background and in the foreground. For
  comparison, DeepSpeed's own `save_checkpoint`, which neither flushes to the disk nor computes a checksum.
- *steps*: the step of stage 1 right after a save that continues in the background, and one while nothing is written.
- *bandwidth*: bytes per second of a blocking save until it is published (the stall also includes the deletion of the
  old one), and of a resume (verified, then loaded) with and without its files in the page cache; compared with `dd` of
  zeros into the same number of files at once, with the same flush. The file system has finished earlier deletions
  before each write. Dropping the page cache needs root.
- *verify*: `lbr checkpoints verify`'s reading compared with `sha256sum` of the same files, in turn, both from the page
  cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import print_result, record, run_ranks

RANKS = 2
STEPS_BESIDE = 2
SETTLE_SECONDS = 2.0


def measure(base: Path, folder: Path, turns: int) -> None:
    """One rank's part."""
    import torch
    import torch.distributed as dist

    from lbr_dist import learn
    from lbr_dist.checkpoint.manifest import Checkpoints
    from lbr_dist.checkpoint.resume import resume
    from lbr_dist.checkpoint.saver import Saver, base_identity
    from lbr_dist.config import CheckpointConfig, DataConfig, LearnConfig, ModelConfig, RunConfig
    from lbr_dist.data.packing import TrainingSequence
    from lbr_dist.data.tokenizer import TextTokenizer
    from lbr_dist.ranks import group
    from lbr_dist.ranks.process import quiet_libraries
    from lbr_dist.trainer import load_engine

    ranks = group.start()
    quiet_libraries()
    config = RunConfig(
        run_dir=str(folder / "run"),
        domain="benchmark",
        model=ModelConfig(base=str(base), dtype="bfloat16"),
        data=DataConfig(corpus="", train=""),
        learn=LearnConfig(max_text_tokens=64, row_tokens=1024),
        checkpoint=CheckpointConfig(keep=1, background=False),
    )
    tokenizer = TextTokenizer(base)
    engine, _ = load_engine(learn.Learn, config, base, tokenizer, ranks)
    engine.train()
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(100, 40000, (16, 96), generator=generator).tolist()
    sequences = [TrainingSequence(tuple(text[:48]), 8, tuple(text[48:])) for text in texts]
    identity = base_identity(base, weights=False)
    checkpoints = Checkpoints(config.run_path / "learn" / "checkpoints")
    times: dict[str, list[float]] = defaultdict(list)

    def clocked(name: str, work: Any) -> Any:
        dist.barrier()
        began = time.perf_counter()
        result = work()
        dist.barrier()
        times[name].append(time.perf_counter() - began)
        return result

    def step() -> None:
        learn.accumulate_step(engine, sequences, config.learn, tokenizer.sink_id, ranks)
        engine.step(1e-5)

    def drop_cache() -> None:
        if ranks.is_first:
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("1")
        dist.barrier()

    def settle() -> None:
        """Flush, so that the next write doesn't pay for earlier deletions, which a file system finishes on a flush."""
        if ranks.is_first:
            os.sync()
            time.sleep(SETTLE_SECONDS)
        dist.barrier()

    def size() -> int:
        return checkpoints.read(checkpoints.steps()[-1]).num_bytes

    number = 0

    def state() -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"step": number}

    def arguments(background: bool) -> Any:
        settings = dataclasses.replace(config.checkpoint, background=background)
        chosen = dataclasses.replace(config, checkpoint=settings)
        return engine, checkpoints, ranks, chosen, "learn", identity, lambda message: print(message, file=sys.stderr)

    step()
    with Saver(*arguments(True)) as behind, Saver(*arguments(False)) as blocking:
        for turn in range(turns + 1):
            for _ in range(STEPS_BESIDE):
                clocked("step alone", step)
            settle()
            blocking.save(state(), {}, None)
            times["blocking stall"].append(blocking.stall)
            times["blocking save, published"].append(blocking.seconds)
            settle()
            behind.save(state(), {}, None)
            times["background stall"].append(behind.stall)
            began = time.perf_counter()
            clocked("step beside a save", step)
            behind.wait()
            times["background save, and a step"].append(time.perf_counter() - began + behind.stall)
            settle()
            clocked("DeepSpeed save_checkpoint", lambda: engine._engine.save_checkpoint(str(folder / "ds"), tag="t"))
            if ranks.is_first:
                shutil.rmtree(folder / "ds")
            for name in ("resume, cached", "resume, from the disk"):
                if name.endswith("disk"):
                    drop_cache()
                clocked(name, lambda: resume(engine, checkpoints, ranks, config, identity))
            settle()
            if ranks.is_first:
                times["dd"].append(dd(folder / f"dd-{turn}", size(), RANKS))
                shutil.rmtree(folder / f"dd-{turn - 1}", ignore_errors=True)  # after the new one, as the saves do
            if turn == 0:
                times.clear()  # a warm-up
    print_result(ranks.rank, bytes=size(), times=times)
    engine.close()
    group.stop()


def dd(folder: Path, size: int, files: int) -> float:
    """Seconds that `dd` takes to write zeros into this many files at once, and flush them."""
    folder.mkdir()
    count = size // files // 2**20
    began = time.perf_counter()
    processes = [
        subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={folder / str(i)}", "bs=1M", f"count={count}", "conv=fsync", "status=none"]
        )
        for i in range(files)
    ]
    assert not any(process.wait() for process in processes)
    return time.perf_counter() - began


def verify_against_sha256sum(folder: Path, turns: int) -> dict[str, float]:
    from lbr_dist.checkpoint.manifest import Checkpoints

    checkpoints = Checkpoints(folder)
    step = checkpoints.steps()[-1]
    files = [str(path) for path in checkpoints.folder(step).glob("*.safetensors")]
    ways = {
        "verify": lambda: checkpoints.verify(step),
        "sha256sum": lambda: subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/base/smollm2-135m"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="a folder on the disk to measure")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_in is not None:
        measure(args.base, args.rank_in, args.turns)
        return
    args.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        options = ["--base", str(args.base), "--turns", str(args.turns), "--rank-in", str(folder)]
        ranks = run_ranks(Path(__file__), *options, ranks=RANKS)
        ways = {way for rank in ranks for way in rank["times"]}
        of_ranks = {way: [rank["times"][way] for rank in ranks if way in rank["times"]] for way in sorted(ways)}
        # for each turn, the time of the slowest rank
        slower = {way: [max(each) for each in zip(*times, strict=True)] for way, times in of_ranks.items()}
        found = {way: statistics.median(times) for way, times in slower.items()}
        size = ranks[0]["bytes"]
        found |= verify_against_sha256sum(folder / "run" / "learn" / "checkpoints", args.turns)
    ratios = {
        "stall, background / blocking": found["background stall"] / found["blocking stall"],
        "step, beside a save / alone": found["step beside a save"] / found["step alone"],
        "bandwidth, save / dd": found["dd"] / found["blocking save, published"],
        "bandwidth, resume from the cache / dd": found["dd"] / found["resume, cached"],
        "bandwidth, resume from the disk / dd": found["dd"] / found["resume, from the disk"],
        "time, blocking save / DeepSpeed's": found["blocking stall"] / found["DeepSpeed save_checkpoint"],
        "time, verify / sha256sum": found["verify"] / found["sha256sum"],
    }
    row = {"ranks": RANKS, "bytes": size, "turns": args.turns, "seconds": found, "ratios": ratios}
    row["of each turn"] = {way: slower[way] for way in ("blocking save, published", "dd")}
    row = json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 4))
    print(json.dumps(row, indent=1))
    record("checkpoints", row)


if __name__ == "__main__":
    main()
