"""What a scenario is given, and the runs that several of them queue."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_dist.config import RepresentConfig, RunConfig
from lbr_dist.slurm.testbed.bed import Bed
from tests.slurm.chains import long_run


@dataclass(frozen=True)
class Place:
    """What a scenario is given: the cluster, the data, and a folder."""

    bed: Bed
    whole: RunConfig
    """The uninterrupted `long_run`, finished."""

    model: Path
    data: Path
    small_disk: Path
    folder: Path
    """The scenario's own."""

    def long(self, **slurm: Any) -> RunConfig:
        return long_run(self.folder / "run", self.model, self.data, **slurm)


def two_stages(place: Place, **slurm: Any) -> RunConfig:
    """`long`, followed by a second stage."""
    return dataclasses.replace(place.long(**slurm), represent=RepresentConfig(steps=3, batch_pairs=8, chunk_tokens=192))
