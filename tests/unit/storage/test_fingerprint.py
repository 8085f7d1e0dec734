"""Fingerprints of files: which contents differ, and when a hash is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.storage import fingerprint


def test_a_hash_is_stored_only_for_a_file_that_did_not_just_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a hand"}\n')
    read: list[Path] = []
    real = fingerprint._block_digest
    monkeypatch.setattr(fingerprint, "_block_digest", lambda file, at: read.append(file) or real(file, at))
    first = fingerprint.fingerprint([corpus], 2, tmp_path / "known")
    assert fingerprint.fingerprint([corpus], 2, tmp_path / "known") == first
    assert len(read) == 2  # the file is too new
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -1)
    assert {fingerprint.fingerprint([corpus], 2, tmp_path / "known") for _ in range(3)} == {first}
    assert len(read) == 3
    (entry,) = (tmp_path / "known").iterdir()
    entry.write_text("{")
    assert fingerprint.fingerprint([corpus], 2, tmp_path / "known") == first


def test_the_order_of_blocks_and_files_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 4)
    contents = {"a": b"0123456789", "b": b"4567012389", "c": b"0123", "d": b"456789"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    sets = ["a", "b", "c", "d", "cd", "dc", "ac"]
    keys = {fingerprint.fingerprint([tmp_path / name for name in names], 3, tmp_path / "k") for names in sets}
    assert len(keys) == len(sets)


def test_hidden_files_and_folders_of_a_model_do_not_count(tmp_path: Path) -> None:
    for name in ("config.json", "1_Pooling/config.json", ".gitattributes", ".cache/huggingface/x.json", "a/.b/c"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = [str(path.relative_to(tmp_path)) for path in fingerprint.visible_files(tmp_path)]
    assert found == ["1_Pooling/config.json", "config.json"]
