"""Configs read from YAML and the command line, and the message for each mistake in them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from lbr_dist import preflight
from lbr_dist.config import ModelConfig, RunConfig, file, to_dict
from lbr_dist.config.changes import forbidden_changes
from lbr_dist.launch import cli
from lbr_dist.ranks.hardware import fitting_dtype
from tests.configs import tiny_run
from tests.unit.launch.cases import message


def test_shipped_configs_load() -> None:
    folder = Path(cli.__file__).parent / "configs"
    names = {path.name: file.read_config(path) for path in folder.glob("*.yaml")}
    assert {"demo.yaml", "medical-7b.yaml"} <= set(names)
    assert names["demo.yaml"].learn.bottleneck == "mask"


def test_config_round_trip(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    path, config = run
    assert file.read_config(path) == config
    file.write_config(config, tmp_path / "again.yaml")
    assert file.read_config(tmp_path / "again.yaml") == config
    changed = file.read_config(path, ["--learn.optimizer.lr=0.5", "--data.query_prompt", "a: b"])
    assert changed.learn.optimizer.lr == 0.5 and changed.data.query_prompt == "a: b"
    assert changed.represent == config.represent


def test_columns_are_a_mapping_that_changes_the_result(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    config = file.read_config(run[0], ['--data.columns={"text": "abstract", "id": "pmid"}'])
    assert config.data.columns == {"text": "abstract", "id": "pmid"}
    file.write_config(config, tmp_path / "again.yaml")
    assert file.read_config(tmp_path / "again.yaml") == config == file.from_plain(to_dict(config), tmp_path)
    assert forbidden_changes(to_dict(run[1]), to_dict(config)) == ["data.columns"]
    before = to_dict(run[1])
    del before["data"]["columns"]  # a run that was started before there was this field
    assert forbidden_changes(before, to_dict(run[1])) == []


def test_the_base_may_be_the_id_of_a_model_in_the_hugging_face_cache(
    run: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    chosen = "--model.base=some/Model-0.6B"
    said = message(capsys, "run", str(run[0]), chosen)
    assert "model.base: found 'some/Model-0.6B', which is not a folder" in said
    assert "`hf download some/Model-0.6B` fetches it" in said
    snapshot = tmp_path / "hub" / "models--some--Model-0.6B" / "snapshots" / ("a" * 40)
    shutil.copytree(run[1].model.base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    config = file.read_config(run[0], [chosen])
    assert config == file.read_config(run[0], [f"--model.base={snapshot}"])
    preflight.check_base(Path(config.model.base))


KEYS = {
    "a column that we do not have": (
        'data.columns: {"texts":"abstract"}',
        r"data.columns: found 'texts', expected one",
    ),
    "a column that no file has": (
        'data.columns: {"text":"abstrct"}',
        r"data.columns: found {text: abstrct}, but no file of the run has a column 'abstrct'; they have 'id', ",
    ),
    "unknown key": ("learn.stepz: 3", r"config.yaml:\d+: unknown key `learn.stepz`. Did you mean `learn.steps`\?"),
    "wrong section": (
        "learn.temperature: 3",
        r"unknown key `learn.temperature`. Did you mean `represent.temperature`\?",
    ),
    "wrong type": ("learn.steps: many", r'config.yaml:\d+: .*"learn.steps".*many'),
    "not a choice": ("learn.bottleneck: masc", r'config.yaml:\d+: .*"learn.bottleneck".*masc'),
    "a prefix wider than the vectors": (
        "represent.prefixes: [8, 999]",
        r"represent.prefixes: found 999, the vectors of .* have 32 elements",
    ),
    "a plan that cannot fit": (
        "represent.chunk_tokens: 1000000000",
        r"represent.chunk_tokens: a step with one chunk of 1,000,000,000 tokens needs .* GiB on each of 2 ranks, "
        r".* may be used. What would fit: represent.chunk_tokens \d+",
    ),
    "descending prefixes": (
        "represent.prefixes: [16, 8]",
        r"represent.prefixes: found \(16, 8\), expected rising widths",
    ),
    "out of range": ("represent.temperature: 0", r"represent.temperature: found 0.*expected a finite number above 0"),
    "negative interval": (
        "represent.diagnose_every: -1",
        r"represent.diagnose_every: found -1, expected zero or more",
    ),
    "contradiction": (
        "model.bottleneck_tokens: 0",
        r"represent.pooling: found 'bottleneck_last' with model.bottleneck_tokens 0",
    ),
    "rows too short": ("learn.row_tokens: 20", r"learn.row_tokens: found 20, expected at least 85"),
}


@pytest.mark.parametrize("name", KEYS)
def test_bad_config(name: str, run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = run
    setting, expected = KEYS[name]
    key, value = setting.split(": ")
    content = to_dict(config)
    section = content
    *parents, last = key.split(".")
    for parent in parents:
        section = section[parent]
    section[last] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(content))

    assert re.search(expected, message(capsys, "run", str(path)).replace("\n", " "))
    assert not config.run_path.exists()


def test_a_run_keeps_the_dtype_that_it_started_with(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", tmp_path, tmp_path, model=ModelConfig(base="x", bottleneck_tokens=4))
    assert config.model.dtype == "auto"
    assert file.settle_dtype(config, gpus=None).model.dtype == "auto"
    fitting = file.settle_dtype(config, gpus=0).model.dtype
    assert fitting == fitting_dtype(0)
    for started in ("bfloat16", "float32"):
        file.write_config(config.with_dtype(started), config.run_path / "config.yaml")
        assert file.settle_dtype(config, gpus=0).model.dtype == started
        assert file.settle_dtype(config, gpus=None).model.dtype == started
    asked = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert file.settle_dtype(asked, gpus=0) is asked
    (config.run_path / "config.yaml").write_text("model: [")
    assert file.settle_dtype(config, gpus=0).model.dtype == fitting
