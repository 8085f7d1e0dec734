"""A grown vocabulary: text comes back as it was, old text keeps its tokens, old rows their values."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import ConfigError, DataError, ModelError
from lbr_dist.model.backbone import WeightFiles, load_backbone
from lbr_dist.vocabulary import add, merges, pieces
from lbr_dist.vocabulary.add import VocabularyReport, add_vocabulary
from lbr_dist.vocabulary.merges import Entry
from tests import tiny

STEMS = ("cardio", "nephro", "hepato", "myo", "neuro", "osteo", "dermato", "encephalo")
ENDS = ("pathy", "megaly", "sclerosis", "trophy", "plasia", "genesis")
RINGS = ("c1ccccc1", "C(=O)O", "C1=CC=CC=C1", "[N+](=O)[O-]", "S(=O)(=O)N")


def prose(generator: random.Random) -> str:
    words = (generator.choice(STEMS) + generator.choice(ENDS) for _ in range(6))
    return f"The heart has {' and '.join(words)}."


def smiles(generator: random.Random) -> str:
    return "".join(generator.choice((*RINGS, "C", "N", "CC(C)")) for _ in range(8))


def code(generator: random.Random) -> str:
    name = generator.choice(("value", "items", "length"))
    return f"def get_{name}(self, key=None):\n    return self._{name}.setdefault(key, 0)"


def write_corpus(file: Path, make: Callable[[random.Random], str], records: int = 400) -> Path:
    generator = random.Random(5)
    rows = ({"id": str(i), "text": make(generator)} for i in range(records))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {make.__name__: write_corpus(folder / f"{make.__name__}.jsonl", make) for make in (prose, smiles, code)}


Grown = tuple[Path, Path, VocabularyReport]


@pytest.fixture(scope="module")
def grown(tiny_model: Path, corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """The tied base, the folder made of it with all three corpora, and the report."""
    out = tmp_path_factory.mktemp("grown") / "llama"
    return tiny_model, out, add_vocabulary(tiny_model, list(corpora.values()), out, 60)


@functools.cache
def tokenizer_of(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


def new_entries(base: Path, out: Path) -> dict[str, int]:
    old = TextTokenizer(base).hf.get_vocab()
    return {name: i for name, i in TextTokenizer(out).hf.get_vocab().items() if name not in old}


# ---- tokens -------------------------------------------------------------------------------------------------------


fragments = st.sampled_from([*STEMS, *ENDS, *RINGS, "self._value", "(self, key=None):\n    ", "<s>", "C(=O)O" * 3])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=8), fragments), max_size=8))
def test_any_text_comes_back(grown: Grown, parts: list[str]) -> None:
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


def test_glued_tokens_are_the_base_tokens_put_together(tiny_model: Path, corpora: dict[str, Path]) -> None:
    content = merges.bpe_content(tiny_model, TextTokenizer(tiny_model).hf.backend_tokenizer)  # type: ignore[attr-defined]
    texts = [json.loads(line)["text"] for line in corpora["prose"].read_text().splitlines()]
    entries = [entry for entry in pieces.choose(content, texts, 40, 10, print) if entry.merge]
    after = merges.tokenizer_of(content, entries)
    stands_for = {after.token_to_id(entry.token): entry.base_ids for entry in entries}
    before = TextTokenizer(tiny_model).encode(texts)
    for text, expected in zip(texts, before, strict=True):
        ids = after.encode(text, add_special_tokens=False).ids
        assert len(ids) < len(expected)
        assert tuple(old for i in ids for old in stands_for.get(i, (i,))) == expected


@pytest.mark.parametrize("count", [5, 20, 60])
def test_a_piece_is_kept_with_those_it_is_glued_from(tiny_model: Path, corpora: dict[str, Path], count: int) -> None:
    content = merges.bpe_content(tiny_model, TextTokenizer(tiny_model).hf.backend_tokenizer)  # type: ignore[attr-defined]
    texts = [json.loads(line)["text"] for name in ("prose", "code") for line in corpora[name].read_text().splitlines()]
    known = set(TextTokenizer(tiny_model).hf.get_vocab())
    for entry in pieces.choose(content, texts, count, 10, print):
        assert set(entry.merge or ()) <= known
        known.add(entry.token)


def test_old_tokens_keep_their_ids_and_special_ones_their_kind(grown: Grown) -> None:
    before, after = (TextTokenizer(each).hf for each in grown[:2])
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert after.all_special_ids == before.all_special_ids
    assert after("<s>C(=O)O</s>", add_special_tokens=False).input_ids[0] == before.bos_token_id


@pytest.mark.parametrize("domain", ["prose", "smiles", "code"])
def test_held_out_text_of_each_domain_gets_shorter(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, domain: str
) -> None:
    report = add_vocabulary(tiny_model, [corpora[domain]], tmp_path / "out", 15)
    fresh = [globals()[domain](random.Random(seed)) for seed in range(100, 130)]
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


def test_no_piece_is_matched_that_would_cut_ordinary_words(grown: Grown) -> None:
    base, out, _ = grown
    added = {token["content"] for token in json.loads((out / "tokenizer.json").read_text())["added_tokens"]}
    added -= set(TextTokenizer(base).hf.all_special_tokens)
    assert added
    for piece in added:
        assert piece.isascii() and not any(c.isspace() for c in piece) and not piece.isalpha() and not piece.isdigit()


def test_a_piece_that_hides_a_special_token_is_not_matched() -> None:
    assert pieces._overlap("x<|im", "<|im_end|>")
    assert pieces._overlap("|>", "<|im_end|>")
    assert pieces._overlap("a<s>", "<s>")
    assert not pieces._overlap("C(=O)O", "<|im_end|>")


def test_a_piece_must_save_where_it_is_found() -> None:
    base = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, ":": 2, "ab": 3}, merges=[("a", "b")]))
    base.pre_tokenizer = pre_tokenizers.Punctuation()
    # "ab:" is ab + :, with "b:" it is a + b: and nothing is won; "b:" alone wins one
    assert pieces._saved_alone(base, {"b:"}, ["ab:"]) == {}
    assert pieces._saved_alone(base, {"b:"}, ["b:"]) == {"b:": 1.0}
    assert pieces._saved_alone(base, {"b:"}, ["b:"] * 19 + ["ab:"]) == {"b:": 0.95}
    assert pieces._saved_alone(base, {"b:"}, ["b:"] * 18 + ["ab:"] * 2) == {}


def test_rules_of_new_pieces_come_after_those_of_the_base() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    after = merges.tokenizer_of(json.loads(tokenizer.to_str()), [Entry("ab", (0, 1), 1, ("a", "b"))])
    assert after.encode("ab").tokens == ["ab"]
    assert after.encode("abc").tokens == ["a", "bc"]


def test_no_rule_makes_a_token_that_exists() -> None:
    entries = merges.learn_merges({("a", "b", "c"): 20}, {"a": 0, "b": 1, "c": 2, "ab": 3}, 5, 10)
    assert [(entry.token, entry.base_ids, entry.merge) for entry in entries] == [
        ("bc", (1, 2), ("b", "c")),
        ("abc", (0, 1, 2), ("a", "bc")),
    ]


def test_the_commonest_piece_is_glued_first_and_counts_what_is_left() -> None:
    ids = {letter: i for i, letter in enumerate("abcd")}
    entries = merges.learn_merges({("a", "b", "c"): 30, ("b", "c", "d"): 15, ("c", "d"): 5}, ids, 9, 5)
    # bc stands in 45 words; after it, ab is in none and cd in 5 instead of 20
    saved = [(entry.token, entry.saved) for entry in entries]
    assert saved == [("bc", 45), ("abc", 30), ("bcd", 15), ("cd", 5)]


def test_a_letter_that_repeats_is_not_counted_twice() -> None:
    # three of a kind hold the pair twice, but it is joined once
    assert [entry.saved for entry in merges.learn_merges({("a", "a", "a"): 6}, {"a": 0}, 1, 6)] == [6]
    assert merges.learn_merges({("a", "a", "a"): 6}, {"a": 0}, 1, 7) == []


def test_short_pieces_inherit_the_uses_of_longer_ones() -> None:
    saved, uses = pieces._without(["(=O)", "C(=O)C"], {"(=O)": 2, "C(=O)C": 9}, {"(=O)": 2, "C(=O)C": 4})
    assert uses == {"(=O)": 11, "C(=O)C": 9}
    assert saved == {"(=O)": 2, "C(=O)C": 2}


def test_matching_is_left_out_where_it_changes_the_text_around_it(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert pieces._keeps_surroundings(merges.bpe_content(tiny_model, tokenizer), "(=O)")
    tokenizer.normalizer = normalizers.Prepend(" ")  # type: ignore[assignment]
    assert not pieces._keeps_surroundings(merges.bpe_content(tiny_model, tokenizer), "(=O)")


# ---- weights ------------------------------------------------------------------------------------------------------


def mean_of(table: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.stack([table[i].double() for i in ids]).sum(0).div(len(ids)).to(table.dtype)


def check_rows(base: Path, out: Path, name: str) -> None:
    old, new = WeightFiles(base).read(name), WeightFiles(out).read(name)
    before = TextTokenizer(base).hf
    assert torch.equal(new[: len(old)], old) and new.dtype == old.dtype
    entries = new_entries(base, out)
    assert len(new) == len(old) + len(entries) and sorted(entries.values()) == list(range(len(old), len(new)))
    after = TextTokenizer(out).hf
    pieces = {after.decode([i]): i for i in entries.values()}
    for entry in json.loads((out / "vocabulary.json").read_text())["top"]:
        ids = before.convert_tokens_to_ids(entry["replaces"])
        token = pieces[entry["piece"]]
        torch.testing.assert_close(new[token], mean_of(old, ids), rtol=1e-6, atol=1e-8)


def test_new_rows_are_means_and_a_tied_model_stays_tied(grown: Grown) -> None:
    base, out, report = grown
    check_rows(base, out, "model.embed_tokens.weight")
    assert "lm_head.weight" not in WeightFiles(out)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"vocab_size": report.rows_after}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(WeightFiles(base).files)


def test_an_untied_model_in_bf16_and_several_files(corpora: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", "qwen3", tied=False)
    weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    parts = {
        "a.safetensors": [n for n in weights if n == "lm_head.weight" or ".0." in n],
        "b.safetensors": [n for n in weights if ".1." in n],
        "c.safetensors": [n for n in weights if n.startswith(("model.embed", "model.norm"))],
    }
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, base / file, {"format": "pt"})
    size = sum(value.nbytes for value in weights.values())
    places = {name: file for file, names in parts.items() for name in names}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    out = tmp_path / "out"
    add_vocabulary(base, [corpora["prose"]], out, 30)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        check_rows(base, out, name)
    for name in set(weights) - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(WeightFiles(out).read(name), weights[name])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": size + 2 * 30 * 32 * 2}, "weight_map": places}
    assert (out / "b.safetensors").read_bytes() == (base / "b.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_old_tokens_are_the_base_models(corpora: dict[str, Path], tmp_path: Path, tied: bool) -> None:
    base = tiny.write_model(tmp_path / "base", tied=tied)
    out = tmp_path / "out"
    add_vocabulary(base, [corpora["smiles"]], out, 20)
    (text,) = (t for t in list(tiny.texts().values())[:1])
    ids = torch.tensor(TextTokenizer(base).encode([text]))
    assert TextTokenizer(out).encode([text]) == [tuple(ids[0].tolist())]
    with torch.no_grad():
        before: Any = AutoModelForCausalLM.from_pretrained(base)
        after: Any = AutoModelForCausalLM.from_pretrained(out)
        old, new = before(ids).logits, after(ids).logits
    assert new.shape[-1] == old.shape[-1] + 20
    # the rows are the same bytes; a product of another width may add them in another order
    torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=1e-6, atol=1e-6)
    ours = load_backbone(out, torch.float32)
    assert torch.equal(ours.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied


def test_spare_rows_of_the_base_are_used_before_the_table_grows(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, torch.full((12, 32), 7.0)])
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": len(table) + 12}))
    few = add_vocabulary(base, [corpora["prose"]], tmp_path / "few", 10)
    assert (few.rows_before, few.rows_after) == (len(table) + 12, len(table) + 12)
    rows = WeightFiles(tmp_path / "few").read("model.embed_tokens.weight")[len(table) :]
    assert (rows == 7.0).all(1).tolist() == [False] * 10 + [True] * 2
    assert add_vocabulary(base, [corpora["prose"]], tmp_path / "more", 15).rows_after == len(table) + 15


# ---- other tokenizers ---------------------------------------------------------------------------------------------


def with_tokenizer(base: Path, tokenizer: Tokenizer, **special: str) -> Path:
    """Replaces a base model's tokenizer by one that is not larger."""
    assert tokenizer.get_vocab_size() <= json.loads((base / "config.json").read_text())["vocab_size"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(base)
    return base


def test_added_tokens_after_the_vocabulary_keep_their_ids(corpora: dict[str, Path], tmp_path: Path) -> None:
    """As Qwen and Llama 3 have them: unknown to the BPE model, and numbered after its last token."""
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


def test_a_tokenizer_of_sentencepieces_kind_glues_alone(corpora: dict[str, Path], tmp_path: Path) -> None:
    """As Llama 2 and Mistral have it: a space before each part of a text, and bytes for the unknown."""
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


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, -3, add.CANDIDATES + 1])
def test_a_number_of_pieces_that_cannot_be(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, pieces: int
) -> None:
    with pytest.raises(ConfigError, match=rf"pieces = {pieces}: expected 1 to 50,000"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", pieces)


def test_more_pieces_than_the_corpus_can_give(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pieces = 9000: the corpus gives at most (\d+)") as caught:
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", 9000)
    assert list(tmp_path.iterdir()) == []
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", most).added == most


def test_an_out_folder_that_is_taken(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="found something there, expected a new or empty folder"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path, 10)
    with pytest.raises(ConfigError, match="is the base model's own folder"):
        add_vocabulary(tiny_model, [corpora["prose"]], tiny_model / ".." / tiny_model.name, 10)


def test_too_little_text(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "few.jsonl", prose, records=19)
    with pytest.raises(DataError, match=r"few\.jsonl: found 19 records, expected at least 20"):
        add_vocabulary(tiny_model, [corpus], tmp_path / "out", 10)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="found an empty file"):
        add_vocabulary(tiny_model, [tmp_path / "none.jsonl"], tmp_path / "out", 10)


def test_a_malformed_record_is_named(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "text": "fine"}\n{"id": "2", "txt": "not"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        add_vocabulary(tiny_model, [tmp_path / "bad.jsonl"], tmp_path / "out", 10)


def test_a_tokenizer_of_another_type(corpora: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "heart": 1}, unk_token="[UNK]"))
    base = with_tokenizer(tiny.write_model(tmp_path / "base"), tokenizer)
    with pytest.raises(ModelError, match=r"tokenizer\.json: model\.type is WordPiece, expected BPE"):
        add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)


def test_a_tokenizer_that_changes_the_text(corpora: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    with_tokenizer(base, tokenizer)
    with pytest.raises(ModelError, match=r"does not restore 380 of 380 passages: 'The"):
        add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)


def test_a_few_texts_that_the_base_changes_are_counted(corpora: dict[str, Path], tmp_path: Path) -> None:
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
    # a byte-level decoder takes é for the byte that it writes so
    monkeypatch.setattr(add, "choose", lambda *_: [Entry("é(", (0,), 1, None)])
    corpus = write_corpus(tmp_path / "corpus.jsonl", lambda generator: smiles(generator) + " é( y")
    with pytest.raises(ModelError, match=r"with the new pieces, it changes 400 of 400 texts that it kept"):
        add_vocabulary(tiny_model, [corpus], tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_failed_write_leaves_nothing(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(add, "write_json", full)
    with pytest.raises(ModelError, match=r"out: could not be written .*No space left"):
        add_vocabulary(tiny_model, [corpora["prose"]], tmp_path / "out", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_job_fills_meanwhile_is_left_alone(
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


def test_every_phase_is_told_before_it_begins(tiny_model: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    add_vocabulary(tiny_model, [corpora["smiles"]], tmp_path / "out", 10, say=lines.append)
    begins = list(dict.fromkeys(line.split()[0] for line in lines))
    assert begins == ["reading", "sentencepiece:", "trying", "counting", "gluing:", "checking", "writing"]


def test_files_of_the_folder_are_carried_over_and_stale_ones_left(
    tiny_model: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    kept, stale = ("chat_template.jinja", "generation_config.json", "LICENSE"), ("merges.txt", "pytorch_model.bin")
    for name in (*kept, *stale):
        (base / name).write_text("{}")
    report = add_vocabulary(base, [corpora["prose"]], tmp_path / "out", 10)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert set(kept) <= names and not names & set(stale)
    assert json.loads((tmp_path / "out" / "vocabulary.json").read_text())["added"] == report.added == 10
    assert "10 entries added" in report.summary()
