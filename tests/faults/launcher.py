"""The real launcher in its own process, so that several runs can be under way at once, each with its own output.

python -m tests.faults.launcher STAGE CONFIG RANKS LOGS     # with the fault in `LBR_FAULT`, see `worker`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lbr_dist.errors import Interrupted, LaunchError
from lbr_dist.launch.local_ranks import run_stage

ENDED = "ended.json"
"""In the run folder: name and text of the error that the launcher raised."""


def main() -> None:
    stage, config, ranks, logs = sys.argv[1:]
    try:
        run_stage(stage, Path(config), int(ranks), Path(logs), worker="tests.faults.worker")
    except (LaunchError, Interrupted) as error:
        Path(config).with_name(ENDED).write_text(json.dumps([type(error).__name__, str(error)]))
        raise


if __name__ == "__main__":
    main()
