"""One process of a run: `python -m lbr_dist.launch.worker learn runs/NAME/config.yaml`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lbr_dist.config import RunConfig, StageName
from lbr_dist.config.file import read_config, settle_dtype, write_config
from lbr_dist.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, LbrError
from lbr_dist.ranks.process import copy_output, large_imports, leave, quiet_libraries
from lbr_dist.storage.files import make_private
from lbr_dist.storage.lock import run_lock

PEER_GONE = "by peer"
"""Part of gloo's message when the other rank has closed the connection."""


def run_stages(
    config: RunConfig, stages: tuple[StageName, ...], record: Callable[[], AbstractContextManager[None]] = nullcontext
) -> bool:
    """Run stages in this process, as one of several ranks. Returns whether this is the first rank.

    Args:
        config: the run.
        stages: what to run, in order.
        record: records the run's start and end, on the first rank and under the lock; a launcher of ours has its own.
    """
    with large_imports():
        from lbr_dist.learn import learn
        from lbr_dist.ranks import group
        from lbr_dist.represent import represent
    minutes = config.cluster.timeout_minutes
    ranks = group.start(minutes)
    quiet_libraries()
    if config.model.dtype == "auto":  # only the ranks know the device, and all of them take the first one's
        gpus = 1 if ranks.device.type == "cuda" else 0
        config = group.from_first(settle_dtype(config, gpus) if ranks.is_first else config, ranks)
        if ranks.is_first:
            write_config(config, config.run_path / "config.yaml")
    name = f"rank {ranks.rank} of {ranks.world_size}"
    try:
        with contextlib.ExitStack() as held:
            if ranks.is_first:
                held.enter_context(run_lock(config.run_path))
                held.enter_context(record())
            for stage in stages:
                make_private(config.stage_path(stage))
                stacks = config.stage_path(stage) / "logs" / f"rank-{ranks.rank}.stacks"
                with ranks.watchdog.watching(60 * minutes, name, f"the start of {stage}", stacks):
                    (learn if stage == "learn" else represent)(config, ranks)
    finally:
        group.stop()
    return ranks.is_first


def evaluate(config: RunConfig) -> None:
    """Score a finished run in this process, write the report and print the table; without test data, only check it."""
    with large_imports():
        from lbr_dist.evaluation.evaluate import check_run, evaluate_run, table
        from lbr_dist.report.page import write_report
    quiet_libraries()
    if config.data.test is None:
        check_run(config)
        print(f"model: {config.evaluated_path} (no data.test, so nothing is evaluated)", flush=True)
        return
    metrics = evaluate_run(config, lambda message: print(message, flush=True))
    examples = json.loads((config.report_path / "examples.json").read_text(encoding="utf-8"))
    page = write_report(config.run_path, metrics, examples)
    print(f"\n{metrics['num_queries']} held-out queries, {metrics['num_documents']:,} documents\n")
    print(table(metrics["systems"]))
    print(f"\nmodel   {config.model_path}\nreport  {page}", flush=True)


def main() -> int:
    stage, path = sys.argv[1:]
    copy_output()
    try:
        if stage == "negatives":
            from lbr_dist.launch.commands.negatives import run_rank

            run_rank(Path(path), lambda message: print(message, flush=True))
            return 0
        config = read_config(path)
        if stage == "evaluate":
            evaluate(config)
        else:
            run_stages(config, ("learn" if stage == "learn" else "represent",))
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except LbrError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if PEER_GONE not in str(error):
            raise
        # the failed rank's log says what went wrong, and the launcher names that rank
        print(f"error: rank {os.environ.get('RANK', '0')}: another rank is gone", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
