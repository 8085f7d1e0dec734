"""What a user gets for a mistake: exit code 1, one clear message, and nothing lost or started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lbr_dist import preflight
from lbr_dist.config import RunConfig, file, to_dict
from lbr_dist.launch import cli
from tests import tiny
from tests.configs import tiny_run


@pytest.fixture
def run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> tuple[Path, RunConfig]:
    """A valid config file over copies of model and data that a test may spoil."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(tiny_data, tmp_path / "data")
    config = tiny_run(tmp_path / "run", tmp_path / "model", tmp_path / "data")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path, config


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert not captured.out or "tokenising" in captured.out
    return captured.err


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


def test_config_command_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    printed = capsys.readouterr().out
    for key in file._known_keys(RunConfig):
        assert key.split(".")[-1] in printed
    assert "--represent.temperature  (float, default 0.05)" in printed


KEYS = {
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
    "prefixes that fall": (
        "represent.prefixes: [16, 8]",
        r"represent.prefixes: found \(16, 8\), expected widths that rise",
    ),
    "out of range": ("represent.temperature: 0", r"represent.temperature: found 0.*expected a finite number above 0"),
    "measured how often": (
        "represent.diagnose_every: -1",
        r"represent.diagnose_every: found -1, expected zero or more",
    ),
    "at odds": (
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
    import re

    assert re.search(expected, message(capsys, "run", str(path)).replace("\n", " "))
    assert not config.run_path.exists()


def _tokenizer_of_another(config: RunConfig) -> None:
    path = Path(config.model.base) / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": ', '"vocab_size": 2, "was": '))


def _encoder_only(config: RunConfig) -> None:
    path = Path(config.model.base) / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "BertModel"))


def _line(name: str, number: int, line: str) -> Callable[[RunConfig], None]:
    def spoil(config: RunConfig) -> None:
        path = Path(config.data.corpus).with_name(name)
        lines = path.read_text().splitlines()
        lines[number - 1] = line
        path.write_text("\n".join(lines) + "\n")

    return spoil


def _shorten(name: str, lines: int) -> Callable[[RunConfig], None]:
    def spoil(config: RunConfig) -> None:
        path = Path(config.data.corpus).with_name(name)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))

    return spoil


def _other_run(config: RunConfig) -> None:
    config.run_path.mkdir()
    (config.run_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config) | {"seed": 17}))


FILES: dict[str, tuple[Callable[[RunConfig], None], str]] = {
    "no base": (lambda c: shutil.rmtree(c.model.base), r"model.base: found '.*', which is not a folder.*lbr data"),
    "no weights": (lambda c: Path(c.model.base, "model.safetensors").unlink(), r"has no model.safetensors"),
    "not causal": (_encoder_only, r"config.json has architecture BertModel, expected one ending in ForCausalLM"),
    "other tokenizer": (_tokenizer_of_another, r"tokenizer and model disagree: .* has vocab_size 2"),
    "no corpus": (lambda c: Path(c.data.corpus).unlink(), r"corpus.jsonl"),
    "empty corpus": (lambda c: Path(c.data.corpus).write_text(""), r"corpus.jsonl.*"),
    "malformed line": (_line("corpus.jsonl", 7, '{"id": "x", '), r"corpus.jsonl:7"),
    "no positives": (_line("train.jsonl", 5, '{"query": "a", "positive_ids": [], "id": "z"}'), r"train.jsonl:5"),
    "unknown id": (
        _line("train.jsonl", 6, '{"query": "a", "positive_ids": ["nope"], "id": "z"}'),
        r"train.jsonl:6.*nope",
    ),
    "few texts": (
        lambda c: (_shorten("corpus.jsonl", 12)(c), _pairs_within(c)),
        r"found 12 texts of two tokens or more to train on .*learn.batch_texts is 13",
    ),
    "few pairs": (_shorten("train.jsonl", 3), r"found 3 pairs, represent.batch_pairs is 11"),
    "another run": (_other_run, r"this run folder holds another config; it differs in seed"),
}


def _pairs_within(config: RunConfig) -> None:
    rows = [row for row in tiny.pairs() if {*row["positive_ids"], *row["negative_ids"]} <= {f"d{i}" for i in range(12)}]  # type: ignore[misc]
    for name in ("train.jsonl", "test.jsonl"):
        path = Path(config.data.corpus).with_name(name)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    import re

    path, config = run
    spoil, expected = FILES[name]
    spoil(config)
    assert re.search(expected, message(capsys, "run", str(path)))
    assert not (config.run_path / "learn").exists()


def test_bad_development_pairs(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused with the file's name before a rank starts; without a fault they are read and pass."""
    path, config = run
    dev = Path(config.data.corpus).with_name("dev.jsonl")
    chosen = f"--data.dev={dev}"
    assert f"{dev}: " in message(capsys, "run", str(path), chosen)
    good = Path(str(config.data.test)).read_text()
    trained = Path(config.data.train).read_text().splitlines()[4]
    for line, expected in (
        ('{"query": "a", ', f"{dev}:17"),
        ('{"query": "a", "positive_ids": ["nope"], "id": "z"}', f"{dev}:17: found document id 'nope'"),
        (trained, f"{dev}: pair {json.loads(trained)['id']!r} has the query {json.loads(trained)['query']!r} of pair"),
    ):
        dev.write_text(f"{good}{line}\n")
        assert expected in message(capsys, "run", str(path), chosen)
    assert not config.run_path.exists()
    dev.write_text(good)
    preflight.check_data(file.read_config(path, [chosen]))


def test_a_path_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: /proc/nowhere: No such file or directory" in message(
        capsys, "data", "medical", "--out", "/proc/nowhere"
    )


def test_an_attention_kernel_that_is_not_there(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("flash_attn", "the package flash-attn is not installed"), ("torch_varlen", "it needs CUDA")):
        said = message(capsys, "run", str(run[0]), f"--model.attention={name}")
        assert f"model.attention: found '{name}', but {reason}" in said
    assert not run[1].run_path.exists()


def test_settings_at_odds(
    run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvme = ("--engine.offload_optimizer=nvme", "--engine.nvme_path=/nowhere")
    for overrides, expected in (
        (("--learn.kl_weight=0.1",), "learn.kl_weight: found 0.1 with learn.bottleneck 'mask'"),
        (nvme, "engine.offload_optimizer: found 'nvme' with checkpoint.resume 'auto'"),
        ((*nvme, "--checkpoint.resume=never"), "engine.nvme_path: found '/nowhere', expected a folder"),
    ):
        assert expected in message(capsys, "run", str(run[0]), *overrides)
    monkeypatch.setattr(preflight.ctypes.util, "find_library", lambda name: None)
    here = (nvme[0], f"--engine.nvme_path={run[0].parent}", "--checkpoint.resume=never")
    assert "Install libaio-dev" in message(capsys, "run", str(run[0]), *here)


def test_too_many_ranks(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ranks: found 1000" in message(capsys, "run", str(run[0]), "--ranks", "1000")
    assert not run[1].run_path.exists()


def test_a_model_too_large_for_memory(run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.hardware, "memory", lambda: (2**30, 2**34))
    with pytest.raises(preflight.LaunchError, match=r"2 ranks of this model need about 1.8 GiB, .* 1.0 GiB free"):
        preflight.check_ranks(run[1], gpus=0)


def test_ranks_default_to_the_gpus(run: tuple[Path, RunConfig]) -> None:
    assert preflight.check_ranks(run[1], gpus=3) == 3
    assert preflight.check_ranks(run[1], gpus=0) == 2


def test_represent_needs_learn(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Run `lbr learn` first" in message(capsys, "represent", str(run[0]))


def test_help_and_config_errors_import_no_torch(run: tuple[Path, RunConfig]) -> None:
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "try: code = cli.main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (["--help"], ["run", str(run[0]), "--learn.stepz=3"], ["run", str(run[0]), "--ranks=1000"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
