"""The whole chain on two nodes, four ranks, to an evaluated model: with names and values that a shell would execute."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig, SlurmConfig
from lbr_dist.errors import CheckpointError
from lbr_dist.exported import verify_export
from lbr_dist.launch.config_file import read_config
from lbr_dist.slurm import records
from lbr_dist.slurm.testbed.bed import Bed
from tests.configs import tiny_run
from tests.slurm import chains
from tests.slurm.chains import lbr, status, submit, wait_over

SECRET = "do-not-write-me-anywhere"
DIRTY = {
    "SLURM_JOB_ID": "999999",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "7",
    "SLURM_NODEID": "3",
    "SLURM_MEM_PER_CPU": "999999",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0xFF",
    "SLURM_CPUS_PER_TASK": "48",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_PARTITION": "nonsense",
    "SRUN_CPUS_PER_TASK": "48",
    "RANK": "5",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "5",
    "MASTER_ADDR": "nowhere",
    "OMP_NUM_THREADS": "77",
    "HF_TOKEN": SECRET,
}
"""What a shell inside another job has."""

VALUE = "a; $(touch executed) `touch executed` \"b\" 'c' | & > executed\n%j %t \\ $HOME ä"


@pytest.fixture(scope="module")
def finished(
    bed: Bed, played: object, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig, dict[str, str]]:
    """The folder of it all, the config, and the ids of the jobs."""
    folder = tmp_path_factory.mktemp("chain") / "a; $(touch executed) 'q' \"d\" %j\nü"
    folder.mkdir()
    config = tiny_run(
        folder / "run; $(touch executed)",
        tiny_model,
        tiny_data,
        slurm=SlurmConfig(
            nodes=2,
            gpus_per_node=2,
            cpus_per_task=1,
            time_minutes=10,
            lead_seconds=60,
            evaluate_minutes=10,
            job_name="job; $(touch executed) 'q' \"d\" %j",
            environment={"LBR_TRIAL": VALUE, "CUDA_VISIBLE_DEVICES": ""},
            setup=("LBR_SETUP='from the config'", "export LBR_SETUP"),
            pass_environment=("LBR_PASSED",),
            extra={"comment": "$(touch executed); 'c'"},
            check_gpus=False,
        ),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, query_prompt=VALUE))
    jobs = submit(config, folder, LBR_PASSED=VALUE, **DIRTY)
    return folder, config, jobs


def test_ends_in_an_evaluated_model(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, jobs = finished
    names = chains.slurm("squeue", "-h", "-o", "%j")
    assert config.slurm.job_name is not None and names.count(config.slurm.job_name) == 3
    found = wait_over(config.run_path, 300)
    assert [row["state"] for row in found.values()] == ["finished"] * 3, chains.told(config.run_path)
    assert list(jobs) == ["learn", "represent", "evaluate"]
    metrics = json.loads((config.report_path / "metrics.json").read_text())
    assert metrics["world_size"] == 4 and metrics["zero_stage"] == 3
    assert metrics["num_queries"] == 16 and set(metrics["systems"]) == {"bm25", "base", "learn", "lbr"}
    for stage in ("learn", "represent"):
        assert len(chains.hosts(found[stage]["nodes"])) == 2 and found[stage]["step"] == 4
        assert sorted(path.name for path in (config.run_path / stage / "logs").glob("rank-*.log")) == [
            f"rank-{rank}.log" for rank in range(4)
        ]
        assert "bytes_between_nodes" in (config.run_path / stage / "metrics.jsonl").read_text()
    for export in (config.learn_export, config.model_path):
        verify_export(export)


def test_nothing_is_executed_and_all_arrives(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    folder, config, _ = finished
    wait_over(config.run_path)
    assert not [path for root in (folder, Path.cwd(), Path.home()) for path in root.glob("**/executed")]
    prompts = json.loads((config.model_path / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == VALUE
    assert read_config(config.run_path / "config.yaml") == config
    assert read_config(config.run_path / "slurm" / "001" / "config-0.yaml") == config


def test_the_environment_is_what_was_asked_for(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    """A fourth job by the same script: it shows its environment instead of training."""
    folder, config, _ = finished
    wait_over(config.run_path)
    script = (config.run_path / "slurm" / "001" / "learn.sh").read_text()
    shown = folder / "environment"
    command = f"exec {shlex.quote(sys.executable)}"
    assert script.count(command) == 1
    probe = folder / "probe.sh"
    probe.write_text(script[: script.index(command)] + f"env -0 >{shlex.quote(str(shown))}\n")
    dirty = {"LBR_PASSED": VALUE} | {k: v for k, v in DIRTY.items() if not k.startswith("SBATCH")}
    chains.slurm("sbatch", "--wait", str(probe), **dirty)
    found = dict(each.split("=", 1) for each in shown.read_text().split("\0") if "=" in each)
    assert found["LBR_PASSED"] == VALUE and found["LBR_SETUP"] == "from the config"
    assert "HF_TOKEN" not in found and "RANK" not in found and "OMP_NUM_THREADS" not in found
    assert found["PYTHONPATH"] == str(config.run_path / "slurm" / "001" / "code")


def test_no_secret_is_written(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, _ = finished
    wait_over(config.run_path)
    files = [path for path in config.run_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_snapshot_runs(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    """The jobs run the code of the submission, kernels and all, not the tree that it was submitted from."""
    _, config, _ = finished
    code = config.run_path / "slurm" / "001" / "code"
    assert not [path for path in code.rglob("*") if path.is_symlink()]
    show = "import lbr_dist.kernels.attention as a, lbr_dist.slurm.job as j; print(a.__file__); print(j.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", show], env={"PYTHONPATH": str(code)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(str(code)) == 2
    script = (config.run_path / "slurm" / "001" / "learn.sh").read_text()
    assert f"export PYTHONPATH={shlex.quote(str(code))}\nexport PYTHONSAFEPATH=1\n" in script


def test_submitted_again(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    """Nothing runs twice: not by `lbr submit`, not by sbatch with the saved script."""
    folder, config, _ = finished
    wait_over(config.run_path)
    done = lbr("submit", str(folder / "submitted.yaml"))
    assert done.returncode == 0 and "all stages are finished" in done.stdout, done
    assert len(records.submissions(config.run_path)) == 1
    before = (config.learn_export / "model.safetensors").stat().st_mtime_ns
    script = config.run_path / "slurm" / "001" / "learn.sh"
    chains.slurm("sbatch", "--wait", str(script))
    assert "finished before, nothing to do" in records.log_file(config.run_path, "learn").read_text()
    assert (config.learn_export / "model.safetensors").stat().st_mtime_ns == before


def test_a_changed_export_is_not_built_upon(finished: tuple[Path, RunConfig, dict[str, str]], tmp_path: Path) -> None:
    _, config, _ = finished
    wait_over(config.run_path)
    weights = config.learn_export / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"model.safetensors: damaged"):
            verify_export(config.learn_export)
        for stage in ("represent", "evaluate"):
            (config.run_path / stage / "summary.json").unlink(missing_ok=True)
        submit(config, tmp_path, "--from", "represent")
        found = wait_over(config.run_path)
        assert found["represent"]["state"] == "failed" and "damaged" in found["represent"]["reason"], found
        assert found["evaluate"]["state"] == "cancelled"
    finally:
        weights.write_bytes(content)


def test_status_and_logs(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, jobs = finished
    wait_over(config.run_path)
    printed = lbr("status", str(config.run_path)).stdout
    assert "finished" in printed and f"job {jobs['learn']}" in printed and "step 4/4" in printed
    assert status(config.run_path)["learn"]["tries"] == 1
    watched = lbr("status", str(config.run_path), "--watch", "--every", "1")
    assert watched.returncode == 0 and "\x1b" not in watched.stdout
    logs = lbr("logs", str(config.run_path), "--stage", "learn", "--follow")
    assert logs.returncode == 0 and "learn: finished" in logs.stdout and "loss" in logs.stdout
    third = lbr("logs", str(config.run_path), "--stage", "learn", "--rank", "3")
    assert third.returncode == 0 and "rank-3.log" in third.stdout
    missing = lbr("logs", str(config.run_path), "--stage", "learn", "--rank", "9")
    assert missing.returncode == 1 and "rank-0.log, rank-1.log, rank-2.log, rank-3.log" in missing.stderr
