"""The `lbr` command on a corpus split into many small parts, with one rank killed after it wrote some.

python -m tests.end_to_end.with_fault RANK:PARTS ARGUMENTS...     # `none` for no fault
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.encode import collection
from lbr_dist.launch import cli
from lbr_dist.ranks.rendezvous import here


def killed_after(parts: int, real: Callable[..., Any]) -> Callable[..., Any]:
    written = 0

    def write(*arguments: Any) -> Any:
        nonlocal written
        if written == parts:
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return real(*arguments)

    return write


def main() -> int:
    fault, *arguments = sys.argv[1:]
    build_tokens._UNIT, build_tokens._SMALL = 3000, 0
    if fault != "none":
        rank, parts = map(int, fault.split(":"))
        place = here()
        if place is not None and place.rank == rank:
            build_tokens.write_part = killed_after(parts, build_tokens.write_part)
            collection._write_part = killed_after(parts, collection._write_part)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
