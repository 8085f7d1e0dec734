"""`lbr submit` without a Slurm: what it refuses, sweeps, and the stages that are left."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lbr_dist.config import RunConfig, SlurmConfig, to_dict
from lbr_dist.launch import cli
from lbr_dist.slurm import submit
from tests.configs import tiny_run


@pytest.fixture
def run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> tuple[Path, RunConfig]:
    config = tiny_run(tmp_path / "run", tiny_model, tiny_data, slurm=SlurmConfig(nodes=2))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path, config


def test_a_dry_run_needs_no_torch_and_no_slurm(run: tuple[Path, RunConfig]) -> None:
    path, config = run
    show = (
        "import sys; from lbr_dist.launch.cli import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", show, "submit", str(path), "--dry-run"],
        env={"PATH": "/nowhere", "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert (
        done.stdout.count("#!/bin/bash") == 3
        and "nothing was queued: 1 run(s), learn, represent, evaluate" in done.stdout
    )
    assert not config.run_path.exists()


def test_without_slurm(
    run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", str(run[0])]) == 1
    assert "sbatch: not found" in capsys.readouterr().err
    assert not list(run[1].run_path.glob("slurm/*/*"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--from=represent", "learn is not finished"),
        ("--sweep=seed", "expected FIELD=V1,V2"),
        ("--sweep=seeds=1,2", "unknown key"),
        ("--sweep=slurm.nodes=1,2", "runs share run_dir and slurm"),
        ("--sweep=seed=0,one", "one"),
        ("--slurm.partitoin=gpu", "Did you mean `slurm.partition`"),
        ("--data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.base=nowhere", "nowhere"),
        ("--slurm.memory_per_node=100K", "Use at least"),
    ],
)
def test_refused_before_anything_is_queued(
    run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str], argument: str, words: str
) -> None:
    assert cli.main(["submit", str(run[0]), argument]) == 1
    assert words in capsys.readouterr().err
    assert not run[1].run_path.exists()


def test_sweep(run: tuple[Path, RunConfig]) -> None:
    path, config = run
    found = list(submit.sweep(path, [], ["seed=0,1", "learn.optimizer.lr=1e-4,1e-3"]))
    assert [label for label, _ in found] == [
        f"seed={seed} learn.optimizer.lr={lr}" for seed in (0, 1) for lr in ("1e-4", "1e-3")
    ]
    assert found[3][1].seed == 1 and found[3][1].learn.optimizer.lr == 1e-3
    assert len({each.run_dir for _, each in found}) == 4
    assert all(each.run_path.parent == config.run_path / "runs" for _, each in found)


def test_the_stages_that_are_left(run: tuple[Path, RunConfig]) -> None:
    _, config = run
    assert submit.left(config, "learn") == ["learn", "represent", "evaluate"]
    _finish(config, "learn")
    assert submit.left(config, "learn") == ["represent", "evaluate"]
    assert submit.left(config, "evaluate") == ["evaluate"]
    _finish(config, "represent")
    assert submit.left(config, "learn") == ["evaluate"]
    shutil.rmtree(config.learn_export)
    assert submit.left(config, "learn") == ["evaluate"], "the model exists, so the first stage's export is not needed"
    shutil.rmtree(config.model_path)
    assert submit.left(config, "learn") == ["learn", "represent", "evaluate"]
    assert submit.left(
        dataclasses.replace(config, represent=dataclasses.replace(config.represent, steps=0)), "learn"
    ) == [
        "learn",
        "evaluate",
    ]


def _finish(config: RunConfig, stage: str) -> None:
    folder = config.learn_export if stage == "learn" else config.model_path
    folder.mkdir(parents=True)
    (folder / "lbr.json").write_text("{}")
    (config.run_path / stage).mkdir(exist_ok=True)
    (config.run_path / stage / "summary.json").write_text("{}")
