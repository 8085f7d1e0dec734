"""Why the ranks of an attempt exited, from what srun printed."""

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
_STOP_SIGNALS = ("Terminated", "User defined signal 2", "Interrupt")
"""srun's names of the signals that ask to stop. A rank that dies of one had not set its handler yet."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt ended."""

    outcome: Literal["finished", "interrupted", "mistaken", "failed"]
    """`mistaken`: an error that the user has to fix; another attempt would fail in the same way."""

    reason: str = ""
    rank: int | None = None
    """The rank whose log has the details."""

    blamed: tuple[str, ...] = ()
    """Nodes that the next attempt should avoid."""


@dataclass(frozen=True, slots=True)
class _End:
    node: str
    rank: int
    how: str

    @property
    def asked_to_stop(self) -> bool:
        return self.how.startswith(_STOP_SIGNALS)

    @property
    def code(self) -> int | None:
        match = _CODE.match(self.how)
        return int(match[1]) if match else None


def numbers(text: str) -> set[int]:
    """The numbers 0, 2, 3, 4 of `0,2-4`."""
    parts = (part.split("-") for part in text.split(","))
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}


def _ranks(found: Iterable[int]) -> str:
    names = sorted(found)
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(map(str, names))}"


def verdict_of(code: int, lines: Iterable[str], node_of: Callable[[int], str] = lambda rank: "its node") -> Verdict:
    """How an attempt ended.

    Args:
        code: srun's exit code.
        lines: srun's standard error, in order. When a rank has exited and the others do not follow, srun reports it
            and kills them.
        node_of: gives the node of a rank.
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
        return Verdict("interrupted", "asked to stop, and saved")
    mistaken = next((end for end in ends if end.code == EXIT_USER_ERROR), None)
    if mistaken is not None:
        return Verdict("mistaken", "", mistaken.rank)
    killed = next((end for end in ends if end.code is None and not end.asked_to_stop), None)
    if killed is not None:
        return Verdict(
            "failed", f"rank {killed.rank} on {killed.node} was killed: {killed.how}", killed.rank, (killed.node,)
        )
    if any(end.asked_to_stop for end in ends):
        return Verdict("interrupted", "asked to stop while no training step was running")
    if silent:
        nodes = tuple(dict.fromkeys(node_of(rank) for rank in sorted(silent)))
        reason = f"{', '.join(nodes)} stopped responding: srun never learned how {_ranks(silent)} ended"
        return Verdict("failed", reason, ends[0].rank if ends else None, nodes)
    hung = next((end for end in ends if end.code == EXIT_HUNG), None)
    if hung is not None and victims:
        where = ", ".join(f"rank {end.rank} on {end.node}" for end in victims)
        nodes = tuple(dict.fromkeys(end.node for end in victims))
        return Verdict("failed", f"{where} hung, and could not exit by itself", hung.rank, nodes)
    if hung is not None:
        reason = "the ranks made no progress and exited; their stacks are next to their logs"
        return Verdict("failed", reason, hung.rank)
    if ends:
        end = ends[0]
        return Verdict("failed", f"rank {end.rank} on {end.node}: {end.how}", end.rank)
    return Verdict("failed", f"srun exited with code {code}")
