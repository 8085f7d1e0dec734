"""Corpora and pairs on disk: the only module that knows their record formats.

A corpus is a list of documents with ids. A pair joins a query to the documents that answer it; it names documents of
the corpus, or contains their texts. Both can be any file that `record_files` reads, or a folder of such files. All
records in a file of pairs must have the format of the first one:

    lbr                     query, positive_ids [, negative_ids, source, id]
    sentence-transformers   anchor (or query), positive [, negative, negative_1.., negatives]
    tevatron                query, positive_passages [, negative_passages, query_id]; passages {docid, title, text}
    tevatron 2              query_text, positive_document_ids [, negative_document_ids, query_id]
    FlagEmbedding           query, pos [, neg]
    ms-swift                query, response [, rejected_response]
    ms-swift messages       messages, positive_messages [, negative_messages]
    question and answer     question, answer [, negative, negative_1.., negatives]
    two sentences           sentence1, sentence2 [, negative, negative_1.., negatives]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lbr_dist.config import RepresentConfig
from lbr_dist.data.fields import conversation, id_of, list_of, text_of, titled_text, whole
from lbr_dist.data.place import CELLS, Place, RawRecord, kind
from lbr_dist.data.record_files import Columns, records, root_of
from lbr_dist.errors import ConfigError, DataError
from lbr_dist.storage.files import atomic_file

_FORMATS = (
    ("lbr", ("query", "positive_ids")),
    ("tevatron", ("query", "positive_passages")),
    ("sentence-transformers", ("anchor", "positive")),
    ("sentence-transformers", ("query", "positive")),
    ("tevatron 2", ("query_text", "positive_document_ids")),
    ("FlagEmbedding", ("query", "pos")),
    ("ms-swift", ("query", "response")),
    ("ms-swift messages", ("messages", "positive_messages")),
    ("question and answer", ("question", "answer")),
    ("two sentences", ("sentence1", "sentence2")),
)
_NAMED = {"lbr": "{}_ids", "tevatron 2": "{}_document_ids"}
"""Formats whose pairs name documents of the corpus, and their fields of ids."""

_POSITIVES = {
    "FlagEmbedding": "pos",
    "ms-swift": "response",
    "question and answer": "answer",
    "two sentences": "sentence2",
}
"""Formats with plain columns of texts whose positives are not in `positive`."""

_NEGATIVES = {"FlagEmbedding": "neg", "ms-swift": "rejected_response"}
"""Those whose negatives are not in `negative`, `negative_1` and so on."""

_KNOWN = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in _FORMATS)


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, the ids of the documents that answer it, and the ids of documents that only look as if they did."""

    id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class PairSet:
    """Pairs, and the text of every document they name."""

    pairs: list[Pair]
    documents: dict[str, str]
    """Document id to text."""

    dropped_negatives: int
    """Negatives left out because they are positives of the same pair."""


# ---- corpora ------------------------------------------------------------------------------------------------------


def documents(path: str | Path, columns: Columns | None = None) -> Iterator[tuple[Place, str, str]]:
    """Place, id and text of each document in file order, read lazily. Ids may repeat. Raises as in `read_corpus`."""
    root, file, with_ids = root_of(Path(path)), None, True
    for place, row in records(Path(path), columns):
        key = next((name for name in ("id", "_id", "docid") if row.get(name) is not None), None)
        if place.file is not file:
            file, with_ids = place.file, key is not None
        if key is not None and not with_ids:
            raise place.error(
                f"{key} = {row[key]!r}", "no id, as in the file's first record", "Give all its records an id, or none."
            )
        document = (
            id_of(place, row, key or "id") if with_ids else whole(place, place.identifier(root), "the file's name")
        )
        yield place, document, whole(place, titled_text(place, row), "its text")


def read_corpus(path: str | Path, columns: Columns | None = None) -> dict[str, str]:
    """Documents by id, in file order.

    Fields: `id` (or `_id`, `docid`), `text`, and optionally `title`, which is put before the text, as in the retrieval
    toolkits; `columns` says where a file has them under other names. In a file without ids, a document's id is the
    file's name (from the given folder on) and its line, ``corpus.jsonl:12``, or the name alone if the file is a text.
    Raises DataError for a missing or empty file, or for a record that cannot be used (with its line).
    """
    texts: dict[str, str] = {}
    places: dict[str, Place] = {}
    for place, document, text in documents(path, columns):
        if document in texts:
            raise place.error(
                f"duplicate document id {document!r} (first at {places[document]})",
                "each id once",
                "Remove one of the two, or give it another id.",
            )
        texts[document] = text
        places[document] = place
    if not texts:
        raise DataError(f"{path}: found no documents, expected at least one record with `id` and `text`.")
    return texts


def check_columns(columns: Columns, paths: Sequence[str]) -> None:
    """Refuse a mapping of columns that no file has: its text would be looked for under our name.

    Args:
        columns: `data.columns`.
        paths: the files and folders of a run.

    Raises:
        ConfigError: names a column that none of their first 1,000 records has.
    """
    found = {name for path in paths for _, row in islice(records(Path(path)), 1000) for name in row}
    for ours, theirs in columns.items():
        if theirs not in found:
            raise ConfigError(
                f"data.columns: found {{{ours}: {theirs}}}, but no file of the run has a column {theirs!r}; they have "
                f"{', '.join(map(repr, sorted(found)))}. Name one of these, or leave it out."
            )


# ---- pairs --------------------------------------------------------------------------------------------------------


def read_pairs(path: str | Path, corpus: Mapping[str, str], columns: Columns | None = None) -> PairSet:
    """Pairs in any known format, with the texts of their documents from `corpus` or from the records themselves.

    A text without an id gets one derived from its content, so that equal texts are one document. Raises DataError
    (with the line) for a record in another format, without positives, with an empty query, or with an unknown id.
    """
    reader = _PairReader(corpus)
    expected = ""
    for place, row in records(Path(path), columns):
        form, query_field = _format_of(place, row)
        expected = expected or form
        if form != expected:
            raise place.error(
                f"a record in the format {form}",
                f"{expected}, as in the first record",
                "Put records of different formats in different files.",
            )
        reader.add(place, row, form, query_field)
    if not reader.pairs:
        raise DataError(f"{path}: found no pairs, expected at least one record. Known formats: {_KNOWN}.")
    return PairSet(reader.pairs, reader.documents, reader.dropped_negatives)


def by_source(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Pairs by source. Sources and pairs keep their file order."""
    sources: dict[str, list[Pair]] = {}
    for pair in pairs:
        sources.setdefault(pair.source, []).append(pair)
    return sources


def check_enough(pairs: list[Pair], settings: RepresentConfig, path: str) -> None:
    """Raises DataError if there are fewer pairs than a batch needs: overall, or in one source with `by_source`."""
    if len(pairs) < settings.batch_pairs:
        raise DataError(
            f"{path}: found {len(pairs)} pairs, represent.batch_pairs is {settings.batch_pairs}. Lower "
            "represent.batch_pairs, or add more pairs."
        )
    if settings.batches == "by_source":
        counts = {source: len(found) for source, found in by_source(pairs).items()}
        small = {source: count for source, count in counts.items() if count < settings.batch_pairs}
        if small:
            named = ", ".join(f"{source!r} has {count}" for source, count in list(small.items())[:5])
            more = f" and {len(small) - 5} more sources have too few" if len(small) > 5 else ""
            raise DataError(
                f"{path}: source {named}{more}; with represent.batches `by_source` each needs represent.batch_pairs "
                f"({settings.batch_pairs}) pairs. Lower represent.batch_pairs, merge sources, or use `mixed`."
            )


def check_apart(dev: list[Pair], train: list[Pair], dev_path: str, train_path: str) -> None:
    """Raises DataError if a development query is also trained on (ignoring differences in white space)."""
    trained: dict[str, str] = {}
    for pair in train:
        trained.setdefault(" ".join(pair.query.split()), pair.id)
    both = [(pair, trained[query]) for pair in dev if (query := " ".join(pair.query.split())) in trained]
    if both:
        pair, other = both[0]
        more = f", and {len(both) - 1} more of its pairs repeat training queries" if len(both) > 1 else ""
        raise DataError(
            f"{dev_path}: pair {pair.id!r} has the query {pair.query[:60]!r} of pair {other!r} in {train_path}{more}. "
            "Expected queries that are never trained on: the loss on trained queries shows nothing. Remove these pairs "
            "from one of the two files."
        )


class _PairReader:
    """Collects pairs and the documents they name, and rejects contradictions."""

    def __init__(self, corpus: Mapping[str, str]) -> None:
        self.corpus = corpus
        self.pairs: list[Pair] = []
        self.documents: dict[str, str] = {}
        self.dropped_negatives = 0
        self.seen: dict[str, Place] = {}

    def add(self, place: Place, row: RawRecord, form: str, query_field: str) -> None:
        # toolkits that train on graded pairs mark non-matching pairs with another label
        for grade in ("label", "score") if form == "two sentences" else ("label",):
            if row.get(grade) not in (None, 1, "1", "1.0", ""):
                raise place.error(
                    f"{grade} = {row[grade]!r}",
                    f"only matching pairs ({grade} 1, or no {grade})",
                    "Remove this record, or write its text as a negative of a matching pair.",
                )
        if form == "ms-swift messages":
            query = conversation(place, row, "messages", row["messages"])
        else:
            query = text_of(place, row, query_field)
        query = whole(place, query, "the query")
        positives = self._documents(place, row, form, "positives")
        if not positives:
            raise place.error(
                "no positive document", "at least one for each query", "Add one to the record, or remove it."
            )
        candidates = self._documents(place, row, form, "negatives")
        negatives = tuple(document for document in candidates if document not in positives)
        self.dropped_negatives += len(candidates) - len(negatives)
        source = row.get("source")
        pair = Pair(
            self._pair_id(place, row),
            query,
            positives,
            negatives,
            whole(place, source, "source") if isinstance(source, str) and source else place.stem,
        )
        self.pairs.append(pair)

    def _pair_id(self, place: Place, row: RawRecord) -> str:
        key = next((name for name in ("id", "query_id") if row.get(name) is not None), None)
        pair = id_of(place, row, key) if key else f"{place.stem}-{place.number}"
        if pair in self.seen:
            raise place.error(
                f"duplicate pair id {pair!r} (first at {self.seen[pair]})",
                "each id once",
                "Merge the two records, or give one another id.",
            )
        self.seen[pair] = place
        return pair

    def _documents(self, place: Place, row: RawRecord, form: str, role: str) -> tuple[str, ...]:
        """Ids of the record's positives or negatives, in order, without duplicates."""
        one = role.removesuffix("s")
        if form in _NAMED:
            ids = list_of(place, row, _NAMED[form].format(one))
            found = [self._known(place, id_of(place, {one: value}, one)) for value in ids]
        elif form == "tevatron":
            found = [self._passage(place, value) for value in list_of(place, row, f"{one}_passages")]
        elif form == "ms-swift messages":
            key = f"{one}_messages"
            texts = [conversation(place, row, key, value) for value in list_of(place, row, key)]
            found = [self._inline(place, None, text) for text in texts]
        else:
            found = [self._inline(place, None, text) for text in _columns(place, row, form, one)]
        return tuple(dict.fromkeys(found))

    def _known(self, place: Place, document: str) -> str:
        if document not in self.corpus:
            raise place.error(
                f"document id {document!r}, which is not in the corpus",
                f"an id of one of the {len(self.corpus)} documents in the corpus",
                "Add the document to the corpus, or put its text in the record.",
            )
        self.documents[document] = self.corpus[document]
        return document

    def _passage(self, place: Place, passage: Any) -> str:
        if not isinstance(passage, dict):
            raise place.error(f"the passage {passage!r}", "an object with `docid` and `text`", "Write it that way.")
        document = id_of(place, passage, "docid") if passage.get("docid") is not None else None
        if document is not None and passage.get("text") is None:
            return self._known(place, document)
        return self._inline(place, document, titled_text(place, passage))

    def _inline(self, place: Place, document: str | None, text: str) -> str:
        text = whole(place, text, "a document's text")
        if document is None:
            document = f"text-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        known = self.documents.get(document, self.corpus.get(document, text))
        if known != text:
            raise place.error(
                f"a different text for document id {document!r}",
                f"{known[:60]!r}, as before",
                "Give one of the two documents another id.",
            )
        self.documents[document] = text
        return document


def _format_of(place: Place, row: RawRecord) -> tuple[str, str]:
    """The format of a pair, and the field of its query."""
    for name, fields in _FORMATS:
        if all(field in row for field in fields):
            return name, fields[0]
    raise place.error(
        f"the fields {', '.join(map(repr, sorted(row))) or '(none)'}",
        "the fields of a known format of pairs",
        f"Known formats: {_KNOWN}. Where only a column's name differs, data.columns maps it.",
    )


def _columns(place: Place, row: RawRecord, form: str, role: str) -> list[str]:
    """Texts in the plain columns of sentence-transformers and others, without empty columns."""
    if role == "positive":
        names = [_POSITIVES.get(form, "positive")]
    elif form in _NEGATIVES:
        names = [_NEGATIVES[form]]
    else:
        numbered = sorted((int(name[9:]), name) for name in row if re.fullmatch(r"negative_\d+", name))
        names = ["negative", *(name for _, name in numbered), "negatives"]
    texts = []
    for name in names:
        value = row.get(name)
        if value == "" and role == "negative" and kind(place.file) in CELLS:
            continue  # CSV has no other way to leave one out
        values = value if isinstance(value, list) else [value] if value is not None else []
        texts += [text_of(place, {name: each}, name) for each in values]
    return texts


# ---- writing ------------------------------------------------------------------------------------------------------


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object per line (UTF-8, keys sorted) and returns their number.

    The file appears under its name only when it is complete; an interrupted write leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_file(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"
            file.write(line.encode())
            count += 1
    return count
