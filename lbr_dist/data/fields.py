"""The fields of a record: texts, ids and lists, or an error that names the record's place."""

from __future__ import annotations

from typing import Any

from lbr_dist.data.place import Place, RawRecord
from lbr_dist.errors import DataError


def text_of(place: Place, row: RawRecord, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(place, row, name, "a text that is not empty")
    return value


def titled_text(place: Place, row: RawRecord) -> str:
    """A document's text, with its title before it."""
    text = text_of(place, row, "text")
    title = row.get("title")
    return f"{title.strip()} {text}" if isinstance(title, str) and title.strip() else text


def id_of(place: Place, row: RawRecord, name: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise _wrong(place, row, name, "an id: a string or an integer")
    return whole(place, value, name)


def list_of(place: Place, row: RawRecord, name: str) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(place, row, name, "a list")
    return value


def conversation(place: Place, row: RawRecord, name: str, turns: Any) -> str:
    """The texts of a conversation's turns, one per line."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _wrong(place, row, name, "turns {role, content}")
    return "\n".join(text_of(place, turn, "content") for turn in turns)


def whole(place: Place, text: str, name: str) -> str:
    """The text, which no tokenizer takes if JSON escapes left half of a surrogate pair in it: a cut emoji, mostly.

    Raises:
        DataError: it has one.
    """
    if text.isascii():  # the usual case, and known without a look at the characters
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise place.error(
            f"half of a surrogate pair in {name}: {around!r}",
            "whole characters",
            "The character was cut in two, perhaps where a text was shortened. Fix or remove this record.",
        ) from None
    return text


def _wrong(place: Place, row: RawRecord, name: str, expected: str) -> DataError:
    if name in row:
        return place.error(f"{name} = {repr(row[name])[:80]}", f"{name}: {expected}", "Fix or remove this record.")
    return place.error(
        f"only the fields {', '.join(map(repr, sorted(row))) or '(none)'}",
        f"{name}: {expected}",
        f"Fix or remove this record; if the column has another name, `data.columns: {{{name}: NAME}}` says so.",
    )
