"""Why the ranks of a try ended, from what srun said of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lbr_dist.errors import EXIT_INTERRUPTED
from lbr_dist.launch.ranks import USER_ERROR
from lbr_dist.watchdog import EXIT_HUNG

_TASKS = re.compile(r"srun: error: (?P<node>[^\s:]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)")
_NODE = re.compile(r"srun: error: Node failure on (?P<nodes>\S+)")
_CODE = re.compile(r"Exited with exit code (\d+)")
_TOLD = ("Terminated", "User defined signal 2", "Interrupt")
"""How srun names the signals that ask to stop: they came before the rank could heed them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a try ended."""

    outcome: Literal["finished", "interrupted", "mistaken", "failed"]
    """`mistaken`: an error that is the user's to mend, which another try would meet again."""

    reason: str = ""
    rank: int | None = None
    """The rank whose log says more."""

    blamed: tuple[str, ...] = ()
    """Nodes that are to be avoided."""


@dataclass(frozen=True, slots=True)
class _End:
    node: str
    rank: int
    how: str

    @property
    def code(self) -> int | None:
        match = _CODE.match(self.how)
        return int(match[1]) if match else None


def judge(code: int, lines: Iterable[str]) -> Verdict:
    """Args:
    code: of srun.
    lines: what srun wrote to its standard error.
    """
    ends: list[_End] = []
    lost: list[str] = []
    for line in lines:
        if match := _TASKS.search(line):
            first = int(re.split("[,-]", match["tasks"])[0])
            ends.append(_End(match["node"], first, match["how"].strip()))
        elif match := _NODE.search(line):
            lost.append(match["nodes"])
    if code == 0:
        return Verdict("finished")
    if lost:
        return Verdict("failed", f"node {', '.join(lost)} failed", blamed=tuple(lost))
    if any(end.code == EXIT_INTERRUPTED for end in ends):
        return Verdict("interrupted", "told to stop, and saved")
    mistaken = next((end for end in ends if end.code == USER_ERROR), None)
    if mistaken is not None:
        return Verdict("mistaken", "", mistaken.rank)
    if ends and all(end.how.startswith(_TOLD) or end.code == 1 for end in ends):
        told = next((end for end in ends if end.how.startswith(_TOLD)), None)
        if told is not None:
            return Verdict("interrupted", "told to stop before the first step")
    killed = [end for end in ends if end.code is None and not end.how.startswith(_TOLD)]
    if killed:
        # the first one: when it was gone, Slurm killed those that waited for it
        end = killed[0]
        reason = f"rank {end.rank} on {end.node} was killed: {end.how}"
        return Verdict("failed", reason, end.rank, (end.node,))
    hung = next((end for end in ends if end.code == EXIT_HUNG), None)
    if hung is not None:
        reason = f"rank {hung.rank} on {hung.node} made no progress and ended itself"
        return Verdict("failed", f"{reason}; every rank's stacks are beside its log", hung.rank)
    if ends:
        end = ends[0]
        return Verdict("failed", f"rank {end.rank} on {end.node}: {end.how}", end.rank)
    return Verdict("failed", f"srun ended with code {code}")
