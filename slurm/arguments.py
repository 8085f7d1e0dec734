"""The options of `lbr submit` and `lbr cancel`; what they do is in `submit.py` and `cancel.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lbr_dist.config.cluster import JOB_STAGES


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML config; every field can be overridden by --section.field=value")
    parser.add_argument("--nodes", type=int, help="nodes of each stage, as slurm.nodes")
    parser.add_argument(
        "--from",
        dest="first",
        choices=JOB_STAGES,
        default="learn",
        help="start with this stage; the ones before it must be finished",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V1,V2",
        help="one run per value, as a job array: --sweep seed=0,1,2. Given several times: one run per combination",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and what was checked; queue nothing")
    parser.set_defaults(takes_overrides=True)


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
