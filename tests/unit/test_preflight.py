"""Checks that run before a rank starts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lbr_dist import preflight
from lbr_dist.config import RunConfig, file, to_dict
from lbr_dist.errors import ConfigError, LaunchError
from lbr_dist.mining import index as mining_index
from tests import tiny
from tests.configs import tiny_run
from tests.unit.launch.cases import message
from tests.unit.mining.cases import settings

# ---- files --------------------------------------------------------------------------------------------------------


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


def _pairs_within(config: RunConfig) -> None:
    rows = [row for row in tiny.pairs() if {*row["positive_ids"], *row["negative_ids"]} <= {f"d{i}" for i in range(12)}]  # type: ignore[misc]
    for name in ("train.jsonl", "test.jsonl"):
        path = Path(config.data.corpus).with_name(name)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = run
    spoil, expected = FILES[name]
    spoil(config)
    assert re.search(expected, message(capsys, "run", str(path)))
    assert not (config.run_path / "learn").exists()


def _quantized(config: RunConfig) -> None:
    path = Path(config.model.base) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))


def _softcapped(config: RunConfig) -> None:
    tiny.write_model(Path(config.model.base), "gemma2")


def _longer(config: RunConfig) -> None:
    path = Path(config.model.base) / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


BASES: dict[str, tuple[Callable[[RunConfig], None], str]] = {
    "quantized": (_quantized, r"config.json: found quantization_config \(fp8\)"),
    "a family": (_softcapped, r"model.base: .*'gemma2', which is not supported: Gemma2Attention asks for softcap"),
    "missing weights": (_longer, r"the weights lack model.layers.2\..* and 6 more"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_refused_before_anything_is_read(
    name: str, run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = run
    spoil, expected = BASES[name]
    spoil(config)
    capsys.readouterr()
    Path(config.data.corpus).unlink()  # it would be missed if it were read first
    shutil.rmtree(config.data.cache_dir, ignore_errors=True)  # of an earlier test
    assert re.search(expected, message(capsys, "run", str(path)))
    assert not Path(config.data.cache_dir).exists()


def test_more_tokens_than_positions(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = run
    base = Path(config.model.base) / "config.json"
    for positions, field, tokens in ((84, "learn.max_text_tokens", 85), (52, "data.max_document_tokens", 53)):
        base.write_text(json.dumps(json.loads(base.read_text()) | {"max_position_embeddings": positions}))
        steps = () if field.startswith("learn") else ("--learn.steps=0",)
        said = message(capsys, "run", str(path), *steps)
        assert f"{field}: found {48 if steps else 40}, which makes sequences of {tokens} tokens" in said
        assert f"has {positions} positions (max_position_embeddings in config.json)" in said
        preflight.check_positions(file.read_config(path, [*steps, f"--{field}=16"]))


def test_bad_development_pairs(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is reported with the file's name before a rank starts; pairs without one pass."""
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


# ---- settings and ranks -------------------------------------------------------------------------------------------


def test_an_attention_kernel_that_cannot_run(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("flash_attn", "the package flash-attn is not installed"), ("torch_varlen", "it needs CUDA")):
        said = message(capsys, "run", str(run[0]), f"--model.attention={name}")
        assert f"model.attention: found '{name}', but {reason}" in said
    assert not run[1].run_path.exists()


def test_contradictory_settings(
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


def test_a_full_disk_is_reported_before_a_rank_starts(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path / "run", tiny_model, tiny_data)
    elements = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    said: list[str] = []
    for room, words in ((12 * elements - 1, None), (12 * elements, 1), (12 * elements * 7, 0)):
        monkeypatch.setattr(preflight, "free_bytes", lambda _, room=room: room)
        if words is None:
            with pytest.raises(LaunchError, match=r"GiB free; a checkpoint takes .* Make room"):
                preflight.check_disk(config, ("learn", "represent"), said.append)
            continue
        preflight.check_disk(config, ("learn", "represent"), said.append)
        assert len(said) == words
        said.clear()


# ---- mining of negatives ------------------------------------------------------------------------------------------


def test_a_machine_without_faiss_or_memory(
    tiny_data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = settings(tiny_data, tiny_model, index="ivf")
    with monkeypatch.context() as patch:
        patch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ConfigError, match=r"faiss is not installed. Install it with `pip install 'lbr-dist\[mining\]'"
        ):
            preflight.check_mining(chosen)
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ConfigError, match=r"faiss cannot be imported .*lbr-dist\[mining\]"):
            mining_index.Ivf(tmp_path / "index", 1, 1)
    monkeypatch.setattr(preflight.hardware, "memory", lambda: (2**31, 2**34))
    assert preflight.check_mining_ranks(chosen, None, gpus=0) <= 2
    assert preflight.check_mining_ranks(chosen, None, gpus=3) == 3
    with pytest.raises(preflight.LaunchError, match="found 3, this machine has room for 2 ranks"):
        preflight.check_mining_ranks(chosen, 3, gpus=0)
