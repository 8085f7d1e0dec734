"""What `lbr submit` and a job decide by themselves, without a Slurm: scripts, verdicts, refusals, sweeps."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lbr_dist.config import RunConfig, SlurmConfig, to_dict
from lbr_dist.errors import CheckpointError, ConfigError
from lbr_dist.export.checksums import verify_export, write_checksums
from lbr_dist.launch import cli
from lbr_dist.slurm import journal, scheduler, submit
from lbr_dist.slurm.script import script
from lbr_dist.slurm.verdict import Verdict, judge, numbers
from tests.configs import tiny_run

# ---- why the ranks of a try ended ----------------------------------------------------------------------------------

PEER = "srun: error: n1: task 0: Exited with exit code 1"
WAITED = "srun: First task exited 5s ago"


@pytest.mark.parametrize(
    ("code", "lines", "outcome", "words", "blamed"),
    [
        (0, [], "finished", "", ()),
        (75, ["srun: error: n2: tasks 1-2: Exited with exit code 75", PEER], "interrupted", "saved", ()),
        (143, ["srun: error: n1: tasks 0-1: Terminated"], "interrupted", "told", ()),
        (140, ["srun: error: n1: task 0: User defined signal 2", PEER], "interrupted", "told", ()),
        (2, ["srun: error: n1: task 0: Exited with exit code 2", PEER], "mistaken", "", ()),
        (137, [PEER, "srun: error: n2: task 3: Killed"], "failed", "rank 3 on n2 was killed: Killed", ("n2",)),
        (139, ["srun: error: n2: task 3: Segmentation fault (core dumped)"], "failed", "Segmentation fault", ("n2",)),
        (137, ["srun: error: n1: task 0: Out Of Memory"], "failed", "Out Of Memory", ("n1",)),
        (70, ["srun: error: n1: tasks 0-1: Exited with exit code 70"], "failed", "no progress", ()),
        (
            137,
            ["srun: error: n1: task 0: Exited with exit code 70", WAITED, "srun: error: n3: task 1: Killed"],
            "failed",
            "rank 1 on n3 hung, and could not end itself",
            ("n3",),
        ),
        (
            137,
            [PEER, WAITED, "srun: StepId=1.0 task 1: running", "srun: error: n2: task 1: Killed"],
            "failed",
            "rank 0 on n1: Exited with exit code 1",
            (),
        ),
        (
            1,
            [PEER, WAITED, "srun: StepId=1.0 tasks 2-3: running", "srun: error: Timed out waiting for job step"],
            "failed",
            "n2 gave no answer any more: the end of ranks 2, 3 was never heard of",
            ("n2",),
        ),
        (1, ["srun: error: Node failure on n2"], "failed", "node n2 failed", ("n2",)),
        (1, ["srun: error: Unable to create step: Invalid"], "failed", "srun ended with code 1", ()),
    ],
)
def test_verdict(code: int, lines: list[str], outcome: str, words: str, blamed: tuple[str, ...]) -> None:
    found = judge(code, lines, lambda rank: f"n{1 + rank // 2}")
    assert (found.outcome, found.blamed) == (outcome, blamed) and words in found.reason, found
    assert isinstance(found, Verdict)


def test_numbers() -> None:
    assert numbers("0,2-4,7") == {0, 2, 3, 4, 7}


# ---- scripts -------------------------------------------------------------------------------------------------------

NASTY = "a b; $(touch executed) `touch executed` 'q' \"d\"\n%j \\ ü"


def text(folder: Path, settings: SlurmConfig, points: int = 0) -> str:
    return script(settings, "learn", "name", folder / "slurm" / "001", folder, folder, sys.executable, points)


def test_a_script_is_what_was_asked_for(tmp_path: Path) -> None:
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


def test_a_script_executes_nothing_of_a_path(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    (folder / "slurm" / "001" / "code").mkdir(parents=True)
    written = folder / "script.sh"
    written.write_text(text(folder, SlurmConfig()))
    done = subprocess.run(["bash", str(written)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not done.stdout + done.stderr
    log = journal.log_file(folder, "learn").read_text()
    assert f"{folder}/slurm/001/chain.json: cannot be read" in log, log
    assert not list(tmp_path.rglob("executed"))


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


def test_the_environment_is_minimal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "OMP_NUM_THREADS", "HF_TOKEN", "MINE", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    found = scheduler.minimal_environment(["MINE"])
    assert found["MINE"] == found["SLURM_CONF"] == "x" and "PATH" in found
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "OMP_NUM_THREADS", "HF_TOKEN"} & set(found)


# ---- submission ----------------------------------------------------------------------------------------------------


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
        ("--sweep=slurm.nodes=1,2", "jobs of an array are alike"),
        ("--sweep=seed=0,one", "one"),
        ("--slurm.partitoin=gpu", "Did you mean `slurm.partition`"),
        ("--data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.base=nowhere", "nowhere"),
        ("--slurm.memory_per_node=100K", "Take at least"),
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


def test_what_is_left(run: tuple[Path, RunConfig]) -> None:
    _, config = run
    assert submit.left(config, "learn") == ["learn", "represent", "evaluate"]
    _finish(config, "learn")
    assert submit.left(config, "learn") == ["represent", "evaluate"]
    assert submit.left(config, "evaluate") == ["evaluate"]
    _finish(config, "represent")
    assert submit.left(config, "learn") == ["evaluate"]
    shutil.rmtree(config.learn_export)
    assert submit.left(config, "learn") == ["evaluate"], "the model is there: its first stage may be gone"
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


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    journal.begin(tmp_path, "learn", "7", "n1", 0)
    journal.end(tmp_path, "learn", "failed", "why", 5, ["n1"])
    with (tmp_path / "slurm" / "tries.jsonl").open("a") as file:
        file.write('{"event": "beg\n')
    journal.begin(tmp_path, "learn", "7", "n2", 5)
    first, second = journal.tries(tmp_path, "learn")
    assert (first.outcome, first.last_step, first.blamed, second.outcome) == ("failed", 5, ["n1"], "")


# ---- exports -------------------------------------------------------------------------------------------------------


def test_an_export_is_verified(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"checksums.json: cannot be read"):
        verify_export(tmp_path)
    write_checksums(tmp_path)
    verify_export(tmp_path)
    (tmp_path / "notes.txt").write_text("added later")
    verify_export(tmp_path)
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == {"1_Pooling/config.json", "model.safetensors"}
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match="damaged"):
        verify_export(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_export(tmp_path)
