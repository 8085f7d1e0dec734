"""The devices that a step is planned for. Figures of GPUs are their makers' data sheets; what is assumed says so.

Imports no torch: a login node asks for these figures too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr_dist.ranks.hardware import memory

if TYPE_CHECKING:
    import torch

GB = 1e9
EFFICIENCY = 0.45
"""Assumed: the share of a GPU's dense bfloat16 peak that the model's matrix products reach."""

INTER_NODE = 50 * GB
"""Assumed: 400 Gb/s of network a GPU."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and its links. Bytes, bytes a second, operations a second."""

    name: str
    memory: float
    flops: float
    """Dense bfloat16 peak."""

    bandwidth: float
    """Of the device's memory."""

    within: float
    """Of a rank's link to the ranks of its node, one way."""

    between: float = INTER_NODE
    """Of a rank's link to other nodes, one way."""

    efficiency: float = EFFICIENCY
    host_bandwidth: float = 25 * GB
    """Of a rank's share of the host's memory, for an offloaded optimizer: assumed."""

    @property
    def rate(self) -> float:
        """Operations a second that are planned with."""
        return self.flops * self.efficiency

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The table's entry for a device of this process; an unknown GPU is taken for an A100 of its own memory."""
        if device.type != "cuda":
            return MACHINES["cpu"]
        import torch

        properties = torch.cuda.get_device_properties(device)
        name = next((n for n in ("b200", "h200", "h100") if n in properties.name.lower()), "a100-80g")
        return dataclasses.replace(MACHINES[name], memory=float(properties.total_memory))


# data sheets: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM, DGX B200; NVLink is half of the total, which is both ways
MACHINES = {
    "a100-80g": Machine("a100-80g", 80 * 2**30, 312e12, 2039 * GB, 300 * GB),
    "h100": Machine("h100", 80 * 2**30, 989e12, 3350 * GB, 450 * GB),
    "h200": Machine("h200", 141 * GB, 989e12, 4800 * GB, 450 * GB),
    "b200": Machine("b200", 180 * GB, 2250e12, 8000 * GB, 900 * GB),
    # a few cores; replaced by the flags of `lbr plan`
    "cpu": Machine("cpu", 0.0, 2e11, 20 * GB, 2 * GB, 1.25 * GB, 1.0, 20 * GB),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The ranks, numbered node by node."""

    machine: Machine
    ranks: int
    ranks_per_node: int


def available_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes: a GPU's whole memory, or this rank's share of what the machine has free."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory()[0] // local_ranks
