"""Why the ranks of a try ended, from what srun said of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lbr_dist.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_USER_ERROR

_TASKS = re.compile(r"srun: error: (?P<node>[^\s:]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)")
_NODE = re.compile(r"srun: error: Node failure on (?P<nodes>\S+)")
_LEFT = re.compile(r"srun: StepId=\S+ tasks? (?P<tasks>[\d,-]+): running")
_CODE = re.compile(r"Exited with exit code (\d+)")
_WAITED = "First task exited"
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
    def told(self) -> bool:
        return self.how.startswith(_TOLD)

    @property
    def code(self) -> int | None:
        match = _CODE.match(self.how)
        return int(match[1]) if match else None


def numbers(text: str) -> set[int]:
    """`0,2-4` written out."""
    parts = (part.split("-") for part in text.split(","))
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}


def _ranks(found: Iterable[int]) -> str:
    names = sorted(found)
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(map(str, names))}"


def judge(code: int, lines: Iterable[str], node_of: Callable[[int], str] = lambda rank: "its node") -> Verdict:
    """Args:
    code: of srun.
    node_of: the node of a rank.
    lines: what srun wrote to its standard error, in its order: when a rank has ended and the others don't follow, srun
        says so, and kills them.
    """
    if code == 0:
        return Verdict("finished")
    ends: list[_End] = []
    victims: list[_End] = []
    silent: set[int] = set()
    waited = False
    for line in lines:
        if match := _NODE.search(line):
            return Verdict("failed", f"node {match['nodes']} failed", blamed=(match["nodes"],))
        waited |= _WAITED in line
        if match := _TASKS.search(line):
            first = min(numbers(match["tasks"]))
            (victims if waited else ends).append(_End(match["node"], first, match["how"].strip()))
            silent -= numbers(match["tasks"])
        elif match := _LEFT.search(line):
            silent |= numbers(match["tasks"])
    if any(end.code == EXIT_INTERRUPTED for end in ends):
        return Verdict("interrupted", "told to stop, and saved")
    mistaken = next((end for end in ends if end.code == EXIT_USER_ERROR), None)
    if mistaken is not None:
        return Verdict("mistaken", "", mistaken.rank)
    killed = next((end for end in ends if end.code is None and not end.told), None)
    if killed is not None:
        return Verdict(
            "failed", f"rank {killed.rank} on {killed.node} was killed: {killed.how}", killed.rank, (killed.node,)
        )
    if any(end.told for end in ends):
        return Verdict("interrupted", "told to stop while no step was running")
    if silent:
        nodes = tuple(dict.fromkeys(node_of(rank) for rank in sorted(silent)))
        reason = f"{', '.join(nodes)} gave no answer any more: the end of {_ranks(silent)} was never heard of"
        return Verdict("failed", reason, ends[0].rank if ends else None, nodes)
    hung = next((end for end in ends if end.code == EXIT_HUNG), None)
    if hung is not None and victims:
        where = ", ".join(f"rank {end.rank} on {end.node}" for end in victims)
        nodes = tuple(dict.fromkeys(end.node for end in victims))
        return Verdict("failed", f"{where} hung, and could not end itself", hung.rank, nodes)
    if hung is not None:
        reason = "the ranks made no progress and ended themselves; their stacks are beside their logs"
        return Verdict("failed", reason, hung.rank)
    if ends:
        end = ends[0]
        return Verdict("failed", f"rank {end.rank} on {end.node}: {end.how}", end.rank)
    return Verdict("failed", f"srun ended with code {code}")
