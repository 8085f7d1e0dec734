"""The devices that a step is planned for. GPU figures are from the makers' data sheets, unless marked as assumed.

Imports no torch: a login node needs these figures too.
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
"""Assumed: a 400 Gb/s network link per GPU."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and its links. Units: bytes, bytes/s, operations/s."""

    name: str
    memory: float
    flops: float
    """Dense bfloat16 peak."""

    bandwidth: float
    """Bandwidth of the device's memory."""

    within: float
    """Bandwidth of a rank's link to the ranks of its node, one way."""

    between: float = INTER_NODE
    """Bandwidth of a rank's link to other nodes, one way."""

    efficiency: float = EFFICIENCY
    host_bandwidth: float = 25 * GB
    """Assumed: a rank's share of the host's memory bandwidth, for an offloaded optimizer."""

    @property
    def rate(self) -> float:
        """Operations/s to plan with."""
        return self.flops * self.efficiency

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The entry in `MACHINES` for a device; an unknown GPU is treated as an A100 with its own memory."""
        if device.type != "cuda":
            return MACHINES["cpu"]
        import torch

        properties = torch.cuda.get_device_properties(device)
        name = next((n for n in ("b200", "h200", "h100") if n in properties.name.lower()), "a100-80g")
        return dataclasses.replace(MACHINES[name], memory=float(properties.total_memory))


# data sheets: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM, DGX B200; NVLink is half of their total, which counts both ways
MACHINES = {
    "a100-80g": Machine("a100-80g", 80 * 2**30, 312e12, 2039 * GB, 300 * GB),
    "h100": Machine("h100", 80 * 2**30, 989e12, 3350 * GB, 450 * GB),
    "h200": Machine("h200", 141 * GB, 989e12, 4800 * GB, 450 * GB),
    "b200": Machine("b200", 180 * GB, 2250e12, 8000 * GB, 900 * GB),
    # assumed: a few cores; memory is measured, and the options of `lbr plan` replace the rest
    "cpu": Machine("cpu", 0.0, 2e11, 20 * GB, 2 * GB, 1.25 * GB, 1.0, 20 * GB),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The ranks, numbered node by node."""

    machine: Machine
    ranks: int
    ranks_per_node: int


def available_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes to plan with: a GPU's whole memory, or on a CPU this rank's share of the machine's free memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory()[0] // local_ranks
