"""The option `--columns`, for commands that read data files without a config."""

from __future__ import annotations

import argparse

from lbr_dist.config import require_columns
from lbr_dist.errors import ConfigError


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add it; `columns_of` reads it."""
    text = "a column with another name than ours, such as text=abstract (repeat it for others); see docs/data.md"
    parser.add_argument("--columns", action="append", default=[], metavar="OURS=THEIRS", help=text)


def columns_of(args: argparse.Namespace) -> dict[str, str] | None:
    """Our names of fields to the files' columns; None without the option.

    Raises:
        ConfigError: not OURS=THEIRS, a name of ours that there is not, or a column twice.
    """
    columns: dict[str, str] = {}
    for given in args.columns:
        ours, equals, theirs = given.partition("=")
        if not equals or ours in columns:
            raise ConfigError(f"--columns: found {given!r}, expected OURS=THEIRS, each name of ours at most once.")
        columns[ours] = theirs
    require_columns(columns, "--columns")
    return columns or None
