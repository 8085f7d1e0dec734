"""The pipeline on a tiny model through the real command: real ranks, real files, real report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lbr_dist.config import STAGES
from lbr_dist.ranks.hardware import fitting_dtype
from tests.end_to_end.runs import config_file, lbr
from tests.faults.runs import workers


def test_run_folder(finished: tuple[Path, Path, str]) -> None:
    _, run, printed = finished
    for name in ("config.yaml", "learn/metrics.jsonl", "learn/export/model.safetensors", "represent/metrics.jsonl"):
        assert (run / name).exists(), name
    for name in ("model/model.safetensors", "model/tokenizer.json", "model/modules.json", "model/README.md"):
        assert (run / name).exists(), name
    for name in ("index.html", "test.qrels", *(f"{system}.run" for system in ("bm25", "base", "learn", "lbr"))):
        assert (run / "report" / name).exists(), name
    steps = [json.loads(line) for line in (run / "learn" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
    assert {"loss", "target_loss", "text_loss", "lr", "grad_norm", "tokens_per_second"} <= set(steps[1])
    assert {"heldout_target_loss", "heldout_perplexity", "effective_rank"} <= set(steps[0]) & set(steps[4])
    assert "LBR: learn, then represent" in printed and "\x1b" not in printed
    assert "model: plain sentence-transformers gives the same tokens and vectors" in printed
    assert "learn     4/4" in printed.replace("      4/4", "     4/4")


def test_metrics_interface(finished: tuple[Path, Path, str]) -> None:
    metrics = json.loads((finished[1] / "report" / "metrics.json").read_text())
    assert metrics["domain"] == "tiny"
    assert metrics["world_size"] == 2 and metrics["zero_stage"] == 3
    # of one rank, as in the log: not the sum of both
    logged = [json.loads(line) for stage in STAGES for line in (finished[1] / stage / "metrics.jsonl").open()]
    peak = max(row.get("peak_memory_bytes", 0) for row in logged)
    assert metrics["seconds"] > 1 and peak <= metrics["peak_memory_bytes"] < 1.5 * peak
    assert metrics["num_queries"] == 16 and metrics["num_documents"] == 96
    assert set(metrics["systems"]) == {"bm25", "base", "learn", "lbr"}
    for values in metrics["systems"].values():
        for name in ("ndcg@10", "recall@10", "recall@100", "mrr@10"):
            low, high = values[f"{name}_interval"]
            assert 0 <= low <= values[name] <= high <= 1
    # every document contains its query's two words, so a search that works finds it
    assert metrics["systems"]["bm25"]["ndcg@10"] > 0.9


def test_the_first_ranks_output_is_in_files(finished: tuple[Path, Path, str]) -> None:
    """All that the command printed, but what the launcher itself said."""
    _, run, printed = finished
    logs = [run / stage / "logs" / "rank-0.log" for stage in ("learn", "represent", "evaluate")]
    written = [line for log in logs for line in log.read_text().splitlines()]
    ours = ["learn: 4 steps on 2 ranks", "represent: 4 steps on 2 ranks"]
    said = printed[printed.index(ours[0]) :].splitlines()
    assert [line for line in said if line not in written] == ours
    assert any(line.startswith("represent 4/4") for line in written)


def test_status_and_logs(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Without Slurm; from any folder."""
    _, run, _ = finished
    done = lbr("status", str(run), PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    score = json.loads((run / "report" / "metrics.json").read_text())["systems"]["lbr"]["ndcg@10"]
    assert done.stdout.count("finished") == 3 and f"nDCG@10    {score:.3f} (" in done.stdout
    assert f"model      {run / 'model'}\n" in done.stdout and str(run / "report" / "index.html") in done.stdout
    done = lbr("logs", str(run), PATH=str(tmp_path))
    assert done.returncode == 0 and "LBR: learn, then represent" in done.stdout


def test_a_second_start_does_nothing(finished: tuple[Path, Path, str]) -> None:
    path, run, _ = finished
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    done = lbr("run", str(path), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, nothing to do") == 2
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_another_config_is_refused(finished: tuple[Path, Path, str]) -> None:
    path, run, _ = finished
    before = (run / "config.yaml").read_text()
    done = lbr("run", str(path), "--ranks", "2", "--learn.text_weight=0.5")
    assert done.returncode == 1
    assert "this run folder holds another config; it differs in learn.text_weight" in done.stderr
    assert (run / "config.yaml").read_text() == before


@pytest.mark.slow
def test_torchrun_gives_the_same_model(
    finished: tuple[Path, Path, str], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = config_file(tmp_path, tiny_model, tiny_data)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = lbr("run", str(path), launcher=torchrun, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = finished[1], tmp_path / "a run"
    assert (ours / "model" / "model.safetensors").read_bytes() == (theirs / "model" / "model.safetensors").read_bytes()
    metrics = [json.loads((run / "report" / "metrics.json").read_text()) for run in (ours, theirs)]
    assert metrics[0]["systems"] == metrics[1]["systems"]


def test_encode_and_evaluate(finished: tuple[Path, Path, str], tiny_data: Path, tmp_path: Path) -> None:
    model = str(finished[1] / "model")
    done = lbr("encode", model, str(tiny_data / "corpus.jsonl"), "--out", str(tmp_path / "v.npy"))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "v.ids").read_text().splitlines()) == 96
    pairs, documents = str(tiny_data / "test.jsonl"), str(tiny_data / "corpus.jsonl")
    beside = ("--beside", f"learn={finished[1] / 'learn' / 'export'}")
    done = lbr("evaluate", model, "--pairs", pairs, "--documents", documents, "--out", str(tmp_path / "e"), *beside)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e" / "metrics.json").read_text())["systems"]
    expected = json.loads((finished[1] / "report" / "metrics.json").read_text())["systems"]
    for ours, theirs in (("model", "lbr"), ("learn", "learn"), ("bm25", "bm25")):
        assert found[ours]["ndcg@10"] == pytest.approx(expected[theirs]["ndcg@10"], abs=1e-6)


def test_a_killed_rank_takes_the_run_down_and_it_resumes(
    finished: tuple[Path, Path, str], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Killing a rank after a checkpoint loses only the steps since then, and leaves no process behind."""
    import signal
    import time

    path = config_file(tmp_path, tiny_model, tiny_data)
    run = tmp_path / "a run"
    command = [sys.executable, "-m", "lbr_dist.launch.cli", "run", str(path), "--ranks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pointer = run / "learn" / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 120
    while not pointer.exists():
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint was written"
        time.sleep(0.01)
    os.kill(workers(run)[-1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert "was killed by signal SIGKILL; all ranks were stopped" in printed
    assert not workers(run)
    told = lbr("status", str(run)).stdout
    assert "stopped" in told and "was killed by signal SIGKILL" in told
    assert f"to resume  lbr run {shlex.quote(str(path))} --ranks 2" in told
    done = lbr("run", str(path), "--ranks", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step" in done.stderr
    ours = (finished[1] / "model" / "model.safetensors").read_bytes()
    assert ours == (run / "model" / "model.safetensors").read_bytes()


def test_auto_is_the_dtype_that_fits_and_stays(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Settled by the launcher, or by the first of ranks that another launcher starts; a resumed run keeps it."""
    path = config_file(tmp_path, tiny_model, tiny_data)
    content = yaml.safe_load(path.read_text())
    content["model"]["dtype"] = "auto"
    content["learn"]["steps"] = 1
    path.write_text(yaml.safe_dump(content))
    fitting, other = fitting_dtype(0), {"bfloat16": "float32", "float32": "bfloat16"}[fitting_dtype(0)]
    done = lbr("learn", str(path), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    assert f"dtype: {fitting}, since this CPU has" in done.stdout
    run = Path(content["run_dir"])
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["dtype"] == fitting
    assert json.loads((run / "learn" / "export" / "config.json").read_text())["dtype"] == fitting
    refused = lbr("learn", str(path), "--ranks", "1", f"--model.dtype={other}")
    assert "it differs in model.dtype" in refused.stderr
    shutil.rmtree(run)
    run.mkdir()
    (run / "config.yaml").write_text(path.read_text())
    worker = [sys.executable, "-m", "lbr_dist.launch.worker", "learn", str(path)]
    subprocess.run(worker, check=True, timeout=120, capture_output=True)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["dtype"] == fitting
