"""`python -m lbr_dist.slurm.testbed up|down [--folder DIR]`: see `bed.py`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lbr_dist.errors import LbrError
from lbr_dist.slurm.testbed.bed import Bed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lbr_dist.slurm.testbed", description="A Slurm on one machine.")
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lbr-testbed"), help="the test bed's folder")
    parser.add_argument("--no-accounting", action="store_true", help="without slurmdbd")
    args = parser.parse_args()
    bed = Bed(args.folder, accounting=not args.no_accounting)
    began = time.monotonic()
    try:
        if args.what == "down":
            bed.down()
            print(f"down; the logs are in {args.folder}/log")
            return 0
        bed.up()
    except LbrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"up after {time.monotonic() - began:.1f} s. To use it:\n\n    export SLURM_CONF={args.folder}/etc/slurm.conf\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
