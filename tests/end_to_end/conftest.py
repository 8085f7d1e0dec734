"""One finished run, for all tests of its results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import config_file, lbr


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A config, its run folder after `lbr run`, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    path = config_file(folder, tiny_model, tiny_data)
    done = lbr("run", str(path), "--ranks", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return path, folder / "a run", done.stdout
