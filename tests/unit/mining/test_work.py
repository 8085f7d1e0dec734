"""The work folder of an interrupted mining."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.errors import ConfigError
from lbr_dist.mining.work import prepare
from tests.unit.mining.cases import settings


def test_another_work_folder_is_refused(data: Path, tiny_model: Path) -> None:
    chosen = settings(data, tiny_model)
    prepare(chosen, print)
    with pytest.raises(ConfigError, match=r"mined.jsonl.work: .* differs in --last, --margin-percent, expected"):
        prepare(settings(data, tiny_model, last=50, margin_percent=None), print)
    with pytest.raises(ConfigError, match=r"differs in --model, --with, contents of files"):
        prepare(settings(data, None), print)
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"id": "more", "text": "more"}\n')
    with pytest.raises(ConfigError, match="differs in contents of files, or the version of torch"):
        prepare(chosen, print)
    (chosen.work / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="differs in all of it"):
        prepare(chosen, print)
