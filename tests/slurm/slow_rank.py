"""Runs a rank's command, here, with a pause before each step: `python slow_rank.py PYTHON -u -m MODULE ARGUMENTS…`.

The pause is a quarter of a second, or what the file says that LBR_TRIAL_PAUSE names.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from lbr_dist.ranks.process import large_imports


def main() -> None:
    module = sys.argv[sys.argv.index("-m") + 1]
    sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
    if module == "lbr_dist.launch.worker":
        with large_imports():
            from lbr_dist import trainer

        take, told = trainer.optimizer_step, Path(os.environ.get("LBR_TRIAL_PAUSE", "/nowhere"))

        def slowly(*arguments: object) -> object:
            time.sleep(float(told.read_text()) if told.exists() else 0.25)
            return take(*arguments)  # type: ignore[arg-type]

        trainer.optimizer_step = slowly  # type: ignore[assignment]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
