"""At the end of a run, its model is opened with plain sentence-transformers and compared with our encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.errors import ExportError
from lbr_dist.evaluation.opened import check_opened
from tests import tiny
from tests.unit.export.cases import exported

TEXTS = list(tiny.texts().values())


@pytest.fixture(scope="module")
def model(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_model, tiny_data, tmp_path_factory.mktemp("run"), "bottleneck_last")[0]


def test_an_export_passes(model: Path) -> None:
    check_opened(model, TEXTS, 192)


def _edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokens": (_edit("tokenizer.json", lambda c: c.update(post_processor=None)), "reads other tokens .* query 'Abn"),
    "length": (_edit("sentence_bert_config.json", lambda c: c.update(max_seq_length=20)), "reads other tokens"),
    "prompt": (_edit("config_sentence_transformers.json", lambda c: c["prompts"].update(query="")), "other tokens"),
    "pooling": (
        _edit("1_Pooling/config.json", lambda c: c.update(pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True)),
        r"another vector than `lbr encode`\. query .*: found unit vectors .* apart, expected at most 0\.001",
    ),
    "files": (lambda folder: shutil.rmtree(folder / "1_Pooling"), "cannot open the exported model"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named(model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage, message = DEFECTS[name]
    damage(folder)
    with pytest.raises(ExportError, match=message):
        check_opened(folder, TEXTS, 192)
