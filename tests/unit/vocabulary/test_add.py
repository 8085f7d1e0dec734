"""Adding vocabulary: text is restored exactly, text without new pieces keeps its tokens, and bad input is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import ConfigError, DataError, ModelError
from lbr_dist.vocabulary import add
from lbr_dist.vocabulary.add import add_vocabulary
from lbr_dist.vocabulary.merges import Entry
from tests import tiny
from tests.unit.vocabulary.cases import (
    DOMAINS,
    ENDS,
    RINGS,
    STEMS,
    Grown,
    new_entries,
    prose,
    smiles,
    tokenizer_of,
    with_tokenizer,
    write_corpus,
)

fragments = st.sampled_from([*STEMS, *ENDS, *RINGS, "self._value", "(self, key=None):\n    ", "<s>", "C(=O)O" * 3])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=8), fragments), max_size=8))
def test_any_text_is_restored(grown: Grown, parts: list[str]) -> None:
    tokenizer = tokenizer_of(grown[1]).hf
    text = "".join(parts)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=8), fragments), max_size=8))
def test_text_without_new_pieces_keeps_its_tokens(grown: Grown, parts: list[str]) -> None:
    base, out, _ = grown
    text = "".join(parts)
    before, after = (tokenizer_of(each).encode([text])[0] for each in (base, out))
    if max(after, default=0) <= tokenizer_of(base).highest_id:
        assert before == after


def test_old_tokens_keep_their_ids_and_special_tokens_stay_special(grown: Grown) -> None:
    before, after = (TextTokenizer(each).hf for each in grown[:2])
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert after.all_special_ids == before.all_special_ids
    assert after("<s>C(=O)O</s>", add_special_tokens=False).input_ids[0] == before.bos_token_id


@pytest.mark.parametrize("domain", ["prose", "smiles", "code"])
def test_held_out_text_of_each_domain_gets_shorter(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, domain: str
) -> None:
    report = add_vocabulary(tiny_model, [corpora[domain]], tmp_path / "out", 15)
    fresh = [DOMAINS[domain](random.Random(seed)) for seed in range(100, 130)]
    before, after = (
        sum(map(len, TextTokenizer(each).encode(fresh))) / sum(len(text.split()) for text in fresh)
        for each in (tiny_model, tmp_path / "out")
    )
    assert after < 0.8 * before
    assert report.tokens_per_word[1] < 0.8 * report.tokens_per_word[0]
    assert report.tokens_per_character[1] < 0.8 * report.tokens_per_character[0]
    assert (report.added, report.glued + report.matched, report.held_out_passages) == (15, 15, 20)


def test_a_smiles_ring_becomes_one_token(grown: Grown) -> None:
    for ring in ("[N+](=O)[O-]", "C1=CC=CC=C1", "c1ccccc1"):
        assert any(ring in piece for piece in new_entries(*grown[:2]))
        assert len(TextTokenizer(grown[1]).encode([ring])[0]) <= 2 < len(TextTokenizer(grown[0]).encode([ring])[0])


def test_matched_pieces_cannot_cut_ordinary_words(grown: Grown) -> None:
    base, out, _ = grown
    added = {token["content"] for token in json.loads((out / "tokenizer.json").read_text())["added_tokens"]}
    added -= set(TextTokenizer(base).hf.all_special_tokens)
    assert added
    for piece in added:
        assert piece.isascii() and not any(c.isspace() for c in piece) and not piece.isalpha() and not piece.isdigit()


# ---- other tokenizers ---------------------------------------------------------------------------------------------


def test_added_tokens_after_the_vocabulary_keep_their_ids(corpora: dict[str, Path], tmp_path: Path) -> None:
    """As in Qwen and Llama 3: unknown to the BPE model, and numbered after its last token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(tiny.texts().values(), trainer)
    end = AddedToken("<|end|>", normalized=False, special=True)
    tokenizer.add_tokens([end, AddedToken("<think>", normalized=False, special=False)])
    base = with_tokenizer(tiny.write_model(tmp_path / "base"), tokenizer, eos_token="<|end|>")
    add_vocabulary(base, [corpora["smiles"], corpora["prose"]], tmp_path / "out", 40)
    before, after = (AutoTokenizer.from_pretrained(each) for each in (base, tmp_path / "out"))
    assert before.get_vocab().items() <= after.get_vocab().items() and len(after) == len(before) + 40
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    new = next(token["content"] for token in added if token["id"] > 301)
    assert after(f"<think>{new}<|end|>").input_ids == [301, after.convert_tokens_to_ids(new), 300]


def test_a_tokenizer_like_sentencepieces_gets_only_glued_pieces(corpora: dict[str, Path], tmp_path: Path) -> None:
    """As in Llama 2 and Mistral: a space before each part of a text, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", *octets], show_progress=False)
    tokenizer.train_from_iterator(tiny.texts().values(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.Sequence(spaces)  # type: ignore[arg-type]
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fused)  # type: ignore[arg-type]
    base = with_tokenizer(tiny.write_model(tmp_path / "base"), tokenizer, unk_token="<unk>")
    report = add_vocabulary(base, [corpora["smiles"], corpora["prose"]], tmp_path / "out", 25)
    assert (report.glued, report.matched) == (25, 0)
    assert report.tokens_per_word[1] < 0.9 * report.tokens_per_word[0]
    text = prose(random.Random(3)) + " Größe ☃"
    after = TextTokenizer(tmp_path / "out").hf.backend_tokenizer  # type: ignore[attr-defined]
    assert after.decode(after.encode(text).ids, skip_special_tokens=False) == text


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, -3, add.CANDIDATES + 1])
def test_an_invalid_number_of_pieces_is_refused(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, pieces: int
) -> None:
    with pytest.raises(ConfigError, match=rf"pieces = {pieces}: expected 1 to 50,000"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", pieces)


def test_more_pieces_than_the_corpus_can_give_are_refused(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"pieces = 9000: the corpus gives at most (\d+)") as caught:
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", 9000)
    assert list(tmp_path.iterdir()) == []
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", most).added == most


def test_an_out_folder_that_is_not_empty_is_refused(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="found something there, expected a new or empty folder"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path, 10)
    with pytest.raises(ConfigError, match="is the base model's own folder"):
        add_vocabulary(tiny_model, [corpora["prose"]], tiny_model / ".." / tiny_model.name, 10)


def test_too_little_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "few.jsonl", prose, records=19)
    with pytest.raises(DataError, match=r"few\.jsonl: found 19 records, expected at least 20"):
        add_vocabulary(tiny_model, [corpus], tmp_path / "out", 10)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="found an empty file"):
        add_vocabulary(tiny_model, [tmp_path / "none.jsonl"], tmp_path / "out", 10)


def test_the_error_names_a_malformed_record(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "text": "fine"}\n{"id": "2", "txt": "not"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        add_vocabulary(tiny_model, [tmp_path / "bad.jsonl"], tmp_path / "out", 10)


def test_a_tokenizer_that_is_not_bpe_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "heart": 1}, unk_token="[UNK]"))
    base = with_tokenizer(tiny.write_model(tmp_path / "base"), tokenizer)
    with pytest.raises(ModelError, match=r"tokenizer\.json: model\.type is WordPiece, expected BPE"):
        add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)


def test_a_tokenizer_that_changes_the_text_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    with_tokenizer(base, tokenizer)
    with pytest.raises(ModelError, match=r"does not restore 380 of 380 passages: 'The"):
        add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)


def test_a_few_texts_that_the_base_tokenizer_changes_are_counted(corpora: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    with_tokenizer(base, tokenizer)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(corpora["prose"].read_text() + json.dumps({"id": "x", "text": "cafe\u0301"}) + "\n")
    assert add_vocabulary(base, [mixed], tmp_path / "out", 10).lossy_passages == 1


def test_a_piece_that_breaks_a_text_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a byte-level decoder mistakes é for the byte that it stands for
    monkeypatch.setattr(add, "choose", lambda *_: [Entry("é(", (0,), 1, None)])
    corpus = write_corpus(tmp_path / "corpus.jsonl", lambda generator: smiles(generator) + " é( y")
    with pytest.raises(ModelError, match=r"with the new pieces, it changes 400 of 400 texts that it restored before"):
        add_vocabulary(tiny_model, [corpus], tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_failed_write_leaves_nothing_behind(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(add, "write_json", full)
    with pytest.raises(ModelError, match=r"out: could not be written .*No space left"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_job_fills_in_the_meantime_is_left_alone(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def say(line: str) -> None:
        if line.startswith("writing"):
            out.mkdir()
            (out / "theirs").write_text("kept")

    with pytest.raises(ConfigError, match="another job filled it"):
        add_vocabulary(tiny_model, [corpora["prose"]], out, 10, say=say)
    assert [each.name for each in tmp_path.rglob("*")] == ["out", "theirs"]


def test_every_phase_is_announced_before_it_starts(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    add_vocabulary(tiny_model, [corpora["smiles"]], tmp_path / "out", 10, say=lines.append)
    begins = list(dict.fromkeys(line.split()[0] for line in lines))
    assert begins == ["reading", "sentencepiece:", "trying", "counting", "gluing:", "checking", "writing"]


def test_other_files_are_copied_except_stale_ones(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    kept, stale = ("chat_template.jinja", "generation_config.json", "LICENSE"), ("merges.txt", "pytorch_model.bin")
    for name in (*kept, *stale):
        (base / name).write_text("{}")
    report = add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert set(kept) <= names and not names & set(stale)
    assert json.loads((tmp_path / "out" / "vocabulary.json").read_text())["added"] == report.added == 10
    assert "10 entries added" in report.summary()
