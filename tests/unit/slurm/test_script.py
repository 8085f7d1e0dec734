"""The batch scripts of the jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lbr_dist.config import SlurmConfig
from lbr_dist.slurm import journal
from lbr_dist.slurm.script import script

NASTY = "a b; $(touch executed) `touch executed` 'q' \"d\"\n%j \\ ü"


def text(folder: Path, settings: SlurmConfig, points: int = 0) -> str:
    return script(settings, "learn", "name", folder / "slurm" / "001", folder, folder, sys.executable, points)


def test_a_script_has_the_settings(tmp_path: Path) -> None:
    settings = SlurmConfig(
        nodes=8,
        gpus_per_node=4,
        cpus_per_task=12,
        memory_per_node="500G",
        time_minutes=600,
        lead_seconds=420,
        partition="gpu",
        account="us",
        qos="long",
        constraint="a100|h100",
        exclude="n[3,7]",
        reservation="ours",
        extra={"mail-type": "FAIL", "exclusive": ""},
        modules=("cuda/12.4",),
        setup=("source activate us",),
        pass_environment=("WANDB_API_KEY",),
    )
    lines = text(tmp_path, settings).splitlines()
    for wanted in (
        "--nodes=8",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=12",
        "--mem=500G",
        "--time=600",
        "--signal=USR2@420",
        "--partition=gpu",
        "--account=us",
        "--qos=long",
        "--constraint='a100|h100'",
        "--exclude='n[3,7]'",
        "--reservation=ours",
        "--mail-type=FAIL",
        "--exclusive",
        "--requeue",
        "--job-name=name-learn",
    ):
        assert f"#SBATCH {wanted}" in lines, wanted
    body = [line for line in lines if not line.startswith("#")]
    assert body.index("module load cuda/12.4") < body.index("source activate us")
    exported = next(line for line in lines if line.startswith("#SBATCH --export="))
    names = exported.split("=")[1].split(",")
    assert names[-1] == "WANDB_API_KEY" and not {"ALL", "NONE", "NIL"} & set(names)


def test_a_script_executes_no_part_of_a_path(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    (folder / "slurm" / "001" / "code").mkdir(parents=True)
    written = folder / "script.sh"
    written.write_text(text(folder, SlurmConfig()))
    done = subprocess.run(["bash", str(written)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not done.stdout + done.stderr
    log = journal.log_file(folder, "learn").read_text()
    assert f"{folder}/slurm/001/chain.json: cannot be read" in log, log
    assert not list(tmp_path.rglob("executed"))
