"""Names of models: a folder, a model in the Hugging Face cache, or what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from lbr_dist.errors import ModelError
from lbr_dist.storage.hub import cached_model, model_folder


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in a cache, laid out as `hf download` does."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--some--Model-0.6B"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_hub_id_is_its_folder_in_the_cache_unless_a_folder_has_that_name(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("some/Model-0.6B", "model") == cached_model("some/Model-0.6B") == cached
    Path("some/Model-0.6B").mkdir(parents=True)
    assert model_folder("some/Model-0.6B", "model") == Path("some/Model-0.6B")
    assert cached_model("a/b/c") is cached_model("../x") is cached_model("some/Other") is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some/Other", "no such folder, and no such model in the Hugging Face cache. If .* `hf download some/Other`"),
        ("modle", "no such folder, .* Did you mean 'model'?"),
        ("a/b/modle", "no such folder. Check the path"),
        ("runs/../modle", "no such folder. Did you mean 'runs/../model'?"),
        ("file", "not a folder but a file"),
    ],
)
def test_a_name_that_means_no_folder(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("runs").mkdir()
    Path("file").touch()
    with pytest.raises(ModelError, match=f"--model: found '{name}', which is .*{says.replace('?', '[?]')}"):
        model_folder(name, "--model")
