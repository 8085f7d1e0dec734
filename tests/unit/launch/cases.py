"""The command's message for a mistake of the user."""

from __future__ import annotations

import pytest

from lbr_dist.launch import cli


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert not captured.out or "tokenising" in captured.out
    return captured.err
