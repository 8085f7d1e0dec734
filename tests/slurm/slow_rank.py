"""Runs a rank's command, here, with a pause before each step: `python slow_rank.py PYTHON -u -m MODULE ARGUMENTS…`."""

from __future__ import annotations

import os
import runpy
import sys
import time


def main() -> None:
    module = sys.argv[sys.argv.index("-m") + 1]
    sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
    if module == "lbr_dist.launch.worker":
        from lbr_dist import trainer

        take, pause = trainer._take, float(os.environ.get("LBR_TRIAL_PAUSE", "0.25"))

        def slowly(*arguments: object) -> object:
            time.sleep(pause)
            return take(*arguments)  # type: ignore[arg-type]

        trainer._take = slowly  # type: ignore[assignment]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
