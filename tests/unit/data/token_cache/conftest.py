"""A tokenizer, a corpus, and builds in separate processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lbr_dist
from lbr_dist.data.token_cache import build as build_tokens
from tests import tiny
from tests.unit.data.token_cache.cases import DRIVER, ROWS, jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small corpus into many parts and use several processes, as for a large one."""
    monkeypatch.setattr(build_tokens, "_UNIT", 5000)
    monkeypatch.setattr(build_tokens, "_SMALL", 0)


@pytest.fixture
def start(tmp_path: Path, tokenizer: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a build in a separate process and process group."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    started = []

    def driver(corpus: Path, cache: Path, processes: int, *modes: str, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", str(script), str(corpus), str(tokenizer), str(cache), str(processes), *modes]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(lbr_dist.__file__).parents[1])},
            **more,
        )
        started.append(process)
        return process

    yield driver
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
