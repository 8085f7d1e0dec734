"""The whole chain on two nodes, four ranks, to an evaluated model, with names and values that a shell would execute."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.file import read_config
from lbr_dist.errors import CheckpointError
from lbr_dist.export.checksums import verify_export
from lbr_dist.slurm import journal
from tests.slurm import chains
from tests.slurm.chains import lbr, status, submit, wait_over
from tests.slurm.scenarios.whole_runs import DIRTY, NASTY_VALUE, SECRET


@pytest.fixture(scope="module")
def finished(played: dict[str, Future[Any]]) -> tuple[Path, RunConfig, dict[str, str]]:
    """The scenario's folder, the config, and the ids of the finished jobs."""
    found: tuple[Path, RunConfig, dict[str, str]] = played["chain"].result()
    return found


def test_ends_in_an_evaluated_model(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, jobs = finished
    found = status(config.run_path)
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
    assert not [path for root in (folder, Path.cwd(), Path.home()) for path in root.glob("**/executed")]
    prompts = json.loads((config.model_path / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == NASTY_VALUE
    assert read_config(config.run_path / "config.yaml") == config
    assert read_config(config.run_path / "slurm" / "001" / "config-0.yaml") == config


def test_the_environment_is_what_was_asked_for(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    """A fourth job with the same script writes out its environment instead of training."""
    folder, config, _ = finished
    script = (config.run_path / "slurm" / "001" / "learn.sh").read_text()
    shown = folder / "environment"
    command = f"exec {shlex.quote(sys.executable)}"
    assert script.count(command) == 1
    probe = folder / "probe.sh"
    probe.write_text(script[: script.index(command)] + f"env -0 >{shlex.quote(str(shown))}\n")
    dirty = {"LBR_PASSED": NASTY_VALUE} | {k: v for k, v in DIRTY.items() if not k.startswith("SBATCH")}
    chains.slurm("sbatch", "--wait", str(probe), **dirty)
    found = dict(each.split("=", 1) for each in shown.read_text().split("\0") if "=" in each)
    assert found["LBR_PASSED"] == NASTY_VALUE and found["LBR_SETUP"] == "from the config"
    assert "HF_TOKEN" not in found and "RANK" not in found and "OMP_NUM_THREADS" not in found
    assert found["PYTHONPATH"] == str(config.run_path / "slurm" / "001" / "code")


def test_no_secret_is_written(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, _ = finished
    files = [path for path in config.run_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_snapshot_runs(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    """The jobs run the submission's snapshot of the code, kernels included, not the tree it was submitted from."""
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
    done = lbr("submit", str(folder / "submitted.yaml"))
    assert done.returncode == 0 and "all stages are finished" in done.stdout, done
    assert len(journal.submissions(config.run_path)) == 1
    before = (config.learn_export / "model.safetensors").stat().st_mtime_ns
    script = config.run_path / "slurm" / "001" / "learn.sh"
    chains.slurm("sbatch", "--wait", str(script))
    assert "already finished, nothing to do" in journal.log_file(config.run_path, "learn").read_text()
    assert (config.learn_export / "model.safetensors").stat().st_mtime_ns == before


def test_status_and_logs(finished: tuple[Path, RunConfig, dict[str, str]]) -> None:
    _, config, jobs = finished
    printed = lbr("status", str(config.run_path)).stdout
    assert "finished" in printed and f"job {jobs['learn']}" in printed and "step 4/4" in printed
    found = status(config.run_path)
    assert found["learn"]["tries"] == 1 and found["learn"]["model"] == ""
    metrics = json.loads((config.report_path / "metrics.json").read_text())
    assert found["evaluate"]["score"] == metrics["systems"]["lbr"]["ndcg@10"]
    assert found["evaluate"]["model"] == str(config.model_path) and str(config.model_path) in printed
    watched = lbr("status", str(config.run_path), "--watch", "--every", "1")
    assert watched.returncode == 0 and "\x1b" not in watched.stdout
    logs = lbr("logs", str(config.run_path), "--stage", "learn", "--follow")
    assert logs.returncode == 0 and "learn: finished" in logs.stdout and "loss" in logs.stdout
    third = lbr("logs", str(config.run_path), "--stage", "learn", "--rank", "3")
    assert third.returncode == 0 and "rank-3.log" in third.stdout
    missing = lbr("logs", str(config.run_path), "--stage", "learn", "--rank", "9")
    assert missing.returncode == 1 and "rank-0.log, rank-1.log, rank-2.log, rank-3.log" in missing.stderr


def test_a_changed_export_is_not_built_upon(finished: tuple[Path, RunConfig, dict[str, str]], tmp_path: Path) -> None:
    """The last test of this chain: afterwards it ends in a failure."""
    _, config, _ = finished
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
