"""What the tests share: tiny models, their data, and pools of real ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.ranks import RankPool

pytest_plugins = ["tests.slurm.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    # the same suite runs on every machine: on the CPU, unless GPU tests are selected with `-m gpu`
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # this process only runs tiny products, and the ranks need the cores: more threads would only wait
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail tests that are skipped for any reason but missing CUDA"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and item.config.getoption("--strict-skips") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but --strict-skips allows that only for a missing GPU: {report.longrepr}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with tied embeddings."""
    return tiny.write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus.jsonl`, `train.jsonl` and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="session", params=[1, 2, 3, pytest.param(4, marks=pytest.mark.slow)], ids=lambda n: f"{n}ranks")
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Pools of 1, 2, 3 and 4 ranks, one after another."""
    ranks = RankPool(request.param)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """A pool of 2 ranks, for tests that don't need every world size."""
    ranks = RankPool(2)
    yield ranks
    ranks.close()
