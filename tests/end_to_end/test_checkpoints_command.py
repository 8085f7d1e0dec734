"""`lbr checkpoints` on the checkpoints of real stages: what it exports is what the stage itself exported."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.checkpoint.shards import ShardReader
from lbr_dist.config import STAGES, LoraConfig, ModelConfig, RunConfig, StageName
from lbr_dist.config.file import from_plain, write_config
from lbr_dist.export import folder, from_checkpoint
from lbr_dist.export.from_checkpoint import stored_model
from lbr_dist.launch import cli
from lbr_dist.model.sharding import whole
from tests import tiny
from tests.configs import tiny_run
from tests.distributed import on_ranks
from tests.ranks import RankPool

LORA = LoraConfig(rank=2, alpha=5.0, targets=("q_proj", "down_proj"))
VARIANTS = {
    "float32, tied": ("float32", True, LoraConfig()),
    "bfloat16, untied": ("bfloat16", False, LoraConfig()),
    "bfloat16, tied, adapters": ("bfloat16", True, LORA),
    "float32, untied, adapters": ("float32", False, LORA),
}


def trained(pool: RankPool, data: Path, folder: Path, variant: str) -> RunConfig:
    """A run of both stages, with checkpoints after 2 and 4 steps."""
    dtype, tied, lora = VARIANTS[variant]
    base = tiny.write_model(folder / "base", tied=tied)
    model = ModelConfig(base=str(base), bottleneck_tokens=4, dtype=dtype, lora=lora)  # type: ignore[arg-type]
    config = tiny_run(folder / "run", base, data, model=model)
    if variant == "float32, untied, adapters":  # parameters that no export has
        learn = replace(config.learn, bottleneck="reinject", kl_weight=0.1)
        represent = replace(config.represent, learn_temperature=True, pooling="mean")
        config = replace(config, learn=learn, represent=represent)
    write_config(config, config.run_path / "config.yaml")
    for stage in STAGES:
        pool.run(on_ranks.stage, config=config, name=stage)
    return config


@pytest.fixture(scope="module", params=VARIANTS)
def config(
    request: pytest.FixtureRequest, two_ranks: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    return trained(two_ranks, tiny_data, tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def plain(two_ranks: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """One run, for what does not depend on the model."""
    return trained(two_ranks, tiny_data, tmp_path_factory.mktemp("plain"), "float32, tied")


@pytest.fixture
def copied(plain: RunConfig, tmp_path: Path) -> Path:
    """A copy of its run folder that a test may damage."""
    return Path(shutil.copytree(plain.run_path, tmp_path / "moved"))


def checkpoints(run: Path, stage: StageName = "learn") -> Checkpoints:
    return Checkpoints(run / stage / "checkpoints")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: str | Path) -> int:
    return cli.main(["checkpoints", *map(str, arguments)])


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_export_equals_the_stages_own(config: RunConfig, stage: StageName, tmp_path: Path) -> None:
    own = config.learn_export if stage == "learn" else config.model_path
    out = tmp_path / "deeper" / "model"
    assert command(config.run_path, "export", "--step", "latest", "--stage", stage, "--out", out) == 0
    found, expected = files(out), files(own)
    assert {"model.safetensors", "tokenizer.json", "config.json", "modules.json", "lbr.json"} <= set(expected)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    # an older checkpoint is another model
    assert command(config.run_path, "export", "--step", "2", "--stage", stage, "--out", tmp_path / "older") == 0
    older, newer = (load_file(folder / "model.safetensors") for folder in (tmp_path / "older", out))
    assert older.keys() == newer.keys() and any(not torch.equal(older[name], newer[name]) for name in newer)


def test_export_in_files_of_a_few_tensors(
    plain: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read in parts that match no parameter's size, written to several files: the same tensors."""
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(from_checkpoint, "_ELEMENTS", 1000)
    assert command(plain.run_path, "export", "--step", "4", "--stage", "learn", "--out", tmp_path / "m") == 0
    parts = sorted((tmp_path / "m").glob("model-*-of-*.safetensors"))
    found = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    expected = load_file(plain.learn_export / "model.safetensors")
    assert len(parts) > 2 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stored_model_holds_no_values(config: RunConfig) -> None:
    there = checkpoints(config.run_path)
    manifest = there.read(4)
    with ShardReader(there.folder(4), manifest.parameters, manifest.world_size) as reader:
        model = stored_model(manifest, reader, config, config.stage_base("learn"))
        parameters = dict(model.named_parameters())
        assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
        with whole(parameters["bottleneck"]) as value:
            assert value.device.type == "cpu" and value.dtype == getattr(torch, config.model.dtype)
            master = reader.whole("master", "bottleneck").view_as(value)
            assert torch.equal(value, master.to(value.dtype))
    assert from_plain(manifest.config, there.folder(4)) == config


def test_export_the_best(plain: RunConfig, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rescore(checkpoints(copied), {2: 1.5, 4: 2.5})
    assert command(copied, "export", "--step", "best", "--stage", "learn", "--out", tmp_path / "best") == 0
    assert "learn step-000002: ok" in capsys.readouterr().out
    assert command(copied, "export", "--step", "best", "--stage", "represent", "--out", tmp_path / "none") == 1
    assert "none of them complete and with a held-out loss" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_moved_run_starts_from_its_own_stage_1(copied: Path, plain: RunConfig, tmp_path: Path) -> None:
    away = plain.run_path.rename(plain.run_path.with_name("away"))
    try:
        assert command(copied, "export", "--step", "4", "--stage", "represent", "--out", tmp_path / "m") == 0
    finally:
        away.rename(plain.run_path)
    assert files(tmp_path / "m") == files(plain.model_path)


def _other_tokenizer(run: Path) -> None:
    path = run / "learn" / "export" / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def _torn(run: Path) -> None:
    path = checkpoints(run, "represent").folder(4) / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_parameters(run: Path) -> None:
    there = checkpoints(run, "represent")
    manifest = there.read(4)
    shapes = {**manifest.parameters, "bottleneck": [5, 32]}
    (there.folder(4) / "manifest.json").write_text(replace(manifest, parameters=shapes).to_text())


def _other_version(run: Path) -> None:
    there = checkpoints(run, "represent")
    manifest = there.read(4)
    (there.folder(4) / "manifest.json").write_text(replace(manifest, config={"new": 1}).to_text())


REFUSED = {
    "no base": (
        lambda run: shutil.rmtree(run / "learn" / "export"),
        "export: does not exist; represent started from its config and tokenizer. Restore",
    ),
    "another base": (_other_tokenizer, "its tokenizer.json is not what represent started from. Restore"),
    "a damaged checkpoint": (_torn, "rank-00001.safetensors: its checksum is"),
    "other parameters": (_other_parameters, "its parameters differ from those of the model in"),
    "another version's config": (_other_version, "manifest.json: this version of lbr-dist cannot read its config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_export_is_refused(name: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = REFUSED[name]
    spoil(copied)
    assert command(copied, "export", "--step", "4", "--stage", "represent", "--out", tmp_path / "m") == 1
    said = capsys.readouterr().err
    assert expected in said and said.startswith("error: ")
    if name == "a damaged checkpoint":
        assert "also has step-000002." in said
    assert not (tmp_path / "m").exists()


def test_a_base_elsewhere(copied: Path, tmp_path: Path, plain: RunConfig) -> None:
    base = (copied / "learn" / "export").rename(tmp_path / "base")
    assert command(copied, "export", "--step=4", "--stage=represent", f"--base={base}", f"--out={tmp_path / 'm'}") == 0
    assert files(tmp_path / "m") == files(plain.model_path)


# ---- verify, list --------------------------------------------------------------------------------------------------


def test_verify(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(copied, "verify") == 0
    said = capsys.readouterr().out
    assert [said.count(f"{stage} step-00000{step}: ok, ") for stage in STAGES for step in (2, 4)] == [1] * 4
    _torn(copied)
    assert command(copied, "verify", "--step", "2") == 0
    capsys.readouterr()
    assert command(copied, "verify") == 1
    said = capsys.readouterr()
    assert "1 of 4 checkpoints read is damaged: represent step-000004." in said.err
    assert "represent step-000004: damaged: " in said.out and said.out.count(": ok, ") == 3


def test_list(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(copied, "--json") == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    logged = {
        (stage, row["step"]): row["loss"]
        for stage in STAGES
        for row in map(json.loads, (copied / stage / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    }
    assert [(one["stage"], one["step"]) for one in found] == [
        ("learn", 2),
        ("learn", 4),
        *(("represent", s) for s in (2, 4)),
    ]
    for one in found:
        assert one["loss"] == pytest.approx(logged[one["stage"], one["step"]], rel=1e-4)
        assert one["state"] == "complete" and one["ranks"] == 2 and one["latest"] == (one["step"] == 4)
        assert one["bytes"] == sum(len(content) for content in files(Path(one["path"])).values())


# ---- prune ---------------------------------------------------------------------------------------------------------


def test_prune_by_the_runs_own_rule(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(copied, "prune") == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert command(copied, "prune", "--keep", "1", "--stage", "learn") == 0
    assert checkpoints(copied).steps() == [4] and checkpoints(copied, "represent").steps() == [2, 4]
    assert command(copied, "export", "--step", "4", "--stage", "learn", "--out", copied / "m") == 0


def test_prune_is_refused_while_a_job_trains(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied / "learn" / "checkpoints")
    with _training(copied):
        assert command(copied, "prune", "--keep", "1", "--dry-run") == 0
        assert "learn step-000002: would be deleted" in capsys.readouterr().out
        assert command(copied, "prune", "--keep", "1") == 1
        assert "another job is training in this run folder: process" in capsys.readouterr().err
    assert files(copied / "learn" / "checkpoints") == before
    assert command(copied, "prune", "--keep", "1") == 0
    assert checkpoints(copied).steps() == checkpoints(copied, "represent").steps() == [4]


@contextlib.contextmanager
def _training(run: Path) -> Iterator[None]:
    """Another process that holds the run's lock."""
    code = (
        "import sys; from pathlib import Path; from lbr_dist.storage.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield
        process.communicate()


def _rescore(there: Checkpoints, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        (there.folder(step) / "manifest.json").write_text(replace(there.read(step), score=score).to_text())


def test_all_but_export_import_no_torch(copied: Path) -> None:
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "code = cli.main(['checkpoints', *sys.argv[1:]])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for arguments in ([], ["--json"], ["verify"], ["prune", "--keep=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(copied), *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert checkpoints(copied).steps() == [4]
