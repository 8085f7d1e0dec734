"""A worker that prints in every way: as Python does, as compiled libraries do, and beside a live bar.

python -m tests.unit.launch.talkative        # the launcher, with this as its worker; what it raises is its exit code
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lbr_dist.errors import LaunchError
from lbr_dist.launch.local_ranks import run_stage
from lbr_dist.metrics import MetricsLog
from lbr_dist.ranks.process import copy_output, leave


def main() -> None:
    stage, path = sys.argv[1:]
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # whose import takes seconds
    copy_output()
    if os.environ["RANK"] != "0":
        print("I am the second", flush=True)
        return
    print("from Python", flush=True)
    log, deadline = Path(path).parent / "logs" / "rank-0.log", time.monotonic() + 30
    while "from Python" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    print("a warning", file=sys.stderr)
    sys.stdout.flush()
    os.write(2, b"from a library\n")
    with MetricsLog(Path(path).parent / "metrics", stage, 2) as log:
        log.log(1, loss=2.5)
        log.say("checkpoint [saved]")
        print("printed beside the bar", flush=True)
        log.log(2, loss=1.25)
    if stage == "much":  # more than a pipe holds, less than two do
        print("much\n" * 20_000, end="")
    print("at the end")
    if stage == "fails":
        print("error: the fault", file=sys.stderr)
        leave(2)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main()
    else:
        config, where = Path(sys.argv[1]) / "config.yaml", Path(sys.argv[1]) / "logs"
        stage = os.environ.get("STAGE", "learn")
        try:
            run_stage(stage, config, 2, where, worker="tests.unit.launch.talkative")
        except LaunchError as error:
            sys.exit(f"LaunchError: {error}")
