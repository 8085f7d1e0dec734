"""`lbr versions` names what a bug report needs."""

from __future__ import annotations

import importlib.metadata

import pytest

import lbr_dist
from lbr_dist.launch.cli import main


def test_the_versions_of_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions"]) == 0
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["lbr-dist"] == lbr_dist.__version__
    for name in ("torch", "transformers", "deepspeed", "numpy", "xxhash"):
        assert found[name] == importlib.metadata.version(name)
    assert found["flash-attn"] == "not installed"
    assert "cores" in found["machine"] and "model.dtype auto: " in found["machine"]
