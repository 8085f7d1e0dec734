"""A larger vocabulary for a base model: the pieces that shorten a domain's text most become tokens of their own.

`pieces.py` chooses them, `merges.py` edits the tokenizer, `tables.py` the weights. Text without the new pieces keeps
its tokens, and a new embedding is the mean of those it replaces. The result is a base model folder like any other.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lbr_dist.console import Say, silent
from lbr_dist.data.fields import titled_text
from lbr_dist.data.record_files import records
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import ConfigError, DataError, ModelError
from lbr_dist.model.backbone import WeightFiles
from lbr_dist.storage.whole_folder import building_folder, publish, remove_stale
from lbr_dist.vocabulary.merges import Entry, bpe_content, encoded, extended, restores, tokenizer_of
from lbr_dist.vocabulary.pieces import CANDIDATES, choose, first, token_counts
from lbr_dist.vocabulary.tables import vocabulary_tables, write_grown, write_json

REPORT = "vocabulary.json"

_PASSAGE = re.compile(r"\S.{0,1999}(?!\S)|\S{2000}", re.DOTALL)  # cut at white space if there is any
_PASSAGES = (100_000, 5_000)  # to choose pieces on, and held out
_COUNTED = 10_000_000  # characters of the passages to choose pieces on


@dataclass(frozen=True, slots=True)
class VocabularyReport:
    """`vocabulary.json`: what the new entries save on held-out texts."""

    base: str
    corpora: list[str]
    min_count: int
    added: int
    glued: int
    matched: int
    rows_before: int
    rows_after: int
    passages: int
    held_out_passages: int
    lossy_passages: int
    """Passages, held out or not, that the base tokenizer itself does not restore exactly."""

    tokens_per_word: tuple[float, float]
    """Before and after, on the held-out passages; a word is anything between white space."""

    tokens_per_character: tuple[float, float]
    top: list[dict[str, Any]]
    """The entries that save most: `piece`, `replaces`, `saved` (tokens of the sample), `kind`."""

    def summary(self) -> str:
        """A few lines for the screen."""
        (words, fewer), (characters, less) = self.tokens_per_word, self.tokens_per_character
        return "\n".join(
            (
                f"{self.added:,} entries added ({self.glued:,} glued, {self.matched:,} matched); "
                f"embeddings {self.rows_before:,} -> {self.rows_after:,} rows",
                f"held out ({self.held_out_passages:,} passages): {words:.3f} -> {fewer:.3f} tokens per word, "
                f"{characters:.3f} -> {less:.3f} per character, {100 * (1 - fewer / words):.1f} % fewer tokens",
                "most saved by: " + ", ".join(repr(each["piece"]) for each in self.top[:10]),
            )
        )


def add_vocabulary(
    base: Path,
    corpora: Sequence[Path],
    out: Path,
    pieces: int,
    min_count: int = 10,
    say: Say = silent,
) -> VocabularyReport:
    """Writes `out`: the base model with `pieces` more tokens, chosen to shorten the texts of `corpora` most.

    Args:
        base: a Hugging Face causal LM folder with safetensors and a fast BPE tokenizer.
        corpora: files or folders as `read_corpus` takes them; sampled, so they may be large.
        out: a folder that doesn't exist or is empty; it appears only when it is whole.
        pieces: entries to add, including intermediate ones that others are glued from.
        min_count: a piece that saves fewer tokens of the sample is not added; its embedding would hardly be trained.
        say: called with lines of progress.

    Raises:
        ConfigError: `pieces`, `min_count` or `out` is not valid.
        DataError: no text, or not enough for this many pieces.
        ModelError: the model or tokenizer is of a kind that cannot be extended.
    """
    base, out = Path(base), Path(out)
    _check_settings(base, out, pieces, min_count)
    text_tokenizer = TextTokenizer(base)
    content = bpe_content(base, text_tokenizer.hf.backend_tokenizer)  # type: ignore[attr-defined]
    tables = vocabulary_tables(base)
    rows = WeightFiles(base).shape(tables[0])[0]
    text_tokenizer.check_fits(rows, base)

    before = tokenizer_of(content)
    sample, held_out = _sample(corpora, say)
    train, kept = _restored(base, before, sample), _restored(base, before, held_out)
    entries = choose(content, train, pieces, min_count, say)
    after = tokenizer_of(content, entries)
    say(f"checking that all {len(train) + len(kept):,} passages can be restored from their tokens")
    if lost := restores(after, train + kept).count(False):
        raise ModelError(
            f"{base}/tokenizer.json: with the new pieces, it changes {lost} of {len(train) + len(kept)} texts that it "
            "restored before. Use another base model, and report this."
        )

    ids = after.get_vocab()
    stands_for = {ids[entry.token]: entry.base_ids for entry in entries}
    words, characters = sum(len(text.split()) for text in kept), sum(map(len, kept))
    old, new = (sum(token_counts(each, kept)) for each in (before, after))
    report = VocabularyReport(
        base=str(base),
        corpora=[str(corpus) for corpus in corpora],
        min_count=min_count,
        added=len(entries),
        glued=sum(entry.merge is not None for entry in entries),
        matched=sum(entry.merge is None for entry in entries),
        rows_before=rows,
        rows_after=max(rows, max(stands_for) + 1),
        passages=len(train),
        held_out_passages=len(kept),
        lossy_passages=len(sample) + len(held_out) - len(train) - len(kept),
        tokens_per_word=(old / words, new / words),
        tokens_per_character=(old / characters, new / characters),
        top=[_described(before, entry) for entry in entries[:100]],
    )

    say(f"writing {out}")
    building = building_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out.parent)
        building.mkdir()
        write_grown(base, building, tables, report.rows_after, stands_for)
        write_json(building / "tokenizer.json", extended(content, entries))
        write_json(building / REPORT, asdict(report))
        _check_loads(base, building, after, kept[:200])
        published = publish(building, out)
    except OSError as error:
        raise ModelError(
            f"{out}: could not be written ({error}). Nothing was left behind. Free some space or name another folder."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not published:
        raise ConfigError(f"out = {out}: another job filled it in the meantime. Name another folder.")
    return report


def _check_settings(base: Path, out: Path, pieces: int, min_count: int) -> None:
    if not 1 <= pieces <= CANDIDATES:
        raise ConfigError(
            f"pieces = {pieces}: expected 1 to {CANDIDATES:,}, as many as sentencepiece is asked to propose. "
            "A few thousand are typical for a domain."
        )
    if min_count < 1:
        raise ConfigError(f"min_count = {min_count}: expected at least 1. Leave it out for the default.")
    if out.resolve() == base.resolve():
        raise ConfigError(f"out = {out}: is the base model's own folder, expected another one. Name a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out = {out}: found something there, expected a new or empty folder. Name another one.")


def _described(tokenizer: Tokenizer, entry: Entry) -> dict[str, Any]:
    replaces = [tokenizer.id_to_token(i) for i in entry.base_ids]
    piece = tokenizer.decode(list(entry.base_ids), skip_special_tokens=False)
    kind = "glued" if entry.merge else "matched"
    return {"piece": piece, "replaces": replaces, "saved": entry.saved, "kind": kind}


# ---- text ---------------------------------------------------------------------------------------------------------


def _sample(corpora: Sequence[Path], say: Say) -> tuple[list[str], list[str]]:
    """Passages to choose pieces on, in random order, and passages of every 20th record to measure on."""
    generator = random.Random(0)
    both: tuple[list[str], list[str]] = ([], [])
    seen = [0, 0]
    number = 0
    say(f"reading {', '.join(map(str, corpora))}")
    for number, (place, row) in enumerate((each for corpus in corpora for each in records(Path(corpus))), 1):
        if number % 100_000 == 0:
            say(f"read {number:,} records")
        part = int(number % 20 == 0)
        for passage in _PASSAGE.finditer(titled_text(place, row)):
            seen[part] += 1
            slot = generator.randrange(seen[part])
            if len(both[part]) < _PASSAGES[part]:
                both[part].append(passage[0].strip())
            elif slot < _PASSAGES[part]:
                both[part][slot] = passage[0].strip()
    sample, held_out = both
    if not held_out:
        raise DataError(
            f"{', '.join(map(str, corpora)) or 'corpora'}: found {number} records, expected at least 20: every 20th is "
            "held out for the report. Give more text; a single long text can be split into records."
        )
    generator.shuffle(sample)
    return list(first(sample, _COUNTED)), held_out


def _restored(base: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts that the tokenizer restores. It is normal if Unicode normalisation changes a few, but not most."""
    fine = restores(tokenizer, texts)
    if 2 * sum(fine) < len(texts):
        text = texts[fine.index(False)]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        raise ModelError(
            f"{base}/tokenizer.json: does not restore {fine.count(False)} of {len(texts)} passages: {text[:60]!r} "
            f"came back as {tokenizer.decode(ids, skip_special_tokens=False)[:60]!r}. Expected a tokenizer that keeps "
            "text as it is. Use another base model, or normalise the corpus the way its tokenizer does."
        )
    return [text for text, good in zip(texts, fine, strict=True) if good]


def _check_loads(base: Path, out: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raises ModelError if transformers loads another tokenizer from the folder than the one that was measured."""
    if TextTokenizer(out).encode(texts) != [tuple(each.ids) for each in encoded(tokenizer, texts)]:
        raise ModelError(
            f"{base}/tokenizer_config.json: its tokenizer class changes tokenizer.json when it is loaded, so "
            "the new pieces are lost. Expected a class that uses the file as it is. Set tokenizer_class to "
            "PreTrainedTokenizerFast."
        )
