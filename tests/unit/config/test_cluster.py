"""The settings of the cluster: the ones that are refused."""

from __future__ import annotations

import pytest

from lbr_dist.config import SlurmConfig
from lbr_dist.errors import ConfigError


def test_secrets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"HF_TOKEN.*slurm.pass_environment"):
        SlurmConfig(environment={"HF_TOKEN": "x"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partition": "a\n#SBATCH --wrap=x"}, "slurm.partition"),
        ({"job_name": "a\nb"}, "slurm.job_name"),
        ({"extra": {"comment": "a\nb"}}, "slurm.extra.comment"),
        ({"extra": {"output": "x"}}, "this one is set by the run"),
        ({"extra": {"-x": "x"}}, "slurm.extra"),
        ({"environment": {"A B": "x"}}, "slurm.environment"),
        ({"pass_environment": ("A=B",)}, "slurm.pass_environment"),
        ({"memory_per_node": "much"}, "slurm.memory_per_node"),
        ({"time_minutes": 5, "lead_seconds": 300}, "less than the time limit, 300 s"),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, "Each rank drives one GPU"),
        ({"nodes": 0}, "slurm.nodes"),
    ],
)
def test_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        SlurmConfig(**settings)  # type: ignore[arg-type]
