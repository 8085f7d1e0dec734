"""Opens an exported model as its users will, with plain sentence-transformers, and compares it with our encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lbr_dist.encode.encoder import Encoder, Kind, SentenceTransformersEncoder
from lbr_dist.errors import ExportError

KINDS: tuple[Kind, Kind] = ("query", "document")

LARGEST_DISTANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Between unit vectors that should be equal: packed and padded rows round differently. Unrelated ones are 1.4 apart."""

ADVICE = (
    "The weights are as trained, but served by other software they would be another model. Please report this with "
    "the folder's config.json and tokenizer_config.json."
)

PLAIN_TEXTS = ("Abnormally large heart.", "def area(r): return 3.14159 * r ** 2", "Über naïve Façaden — 漢字, Ωmega")


def samples(texts: Sequence[str], max_tokens: int) -> list[str]:
    """A few of these texts: the shortest, the longest, one with outer white space, and one that has to be cut."""
    by_length = sorted(texts, key=len)
    short, long = by_length[0], by_length[-1]
    enough = " ".join([long] * (8 * max_tokens // len(long) + 1))  # a token is rarely longer than eight characters
    return [short, long, f"\n  {short} \t\n", f"{enough}\n"]


def check_opened(folder: Path, texts: Sequence[str], chunk_tokens: int) -> None:
    """Compare token ids and vectors on a few texts, as queries and as documents, alone and padded.

    Args:
        folder: a model that lbr-dist exported.
        texts: of the model's domain.
        chunk_tokens: tokens in one of our forward passes.

    Raises:
        ExportError: sentence-transformers cannot open the folder, or makes something else of a text.
    """
    encoder = Encoder(folder, chunk_tokens=chunk_tokens)
    chosen = samples(texts, encoder.settings.max_tokens)
    expected = {kind: (encoder.ids(chosen, kind), encoder.encode(chosen, kind)) for kind in KINDS}
    dtype = next(encoder.model.parameters()).dtype
    device = encoder.device
    del encoder
    try:
        opened = SentenceTransformersEncoder(folder, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ExportError(
            f"{folder}: sentence-transformers cannot open the exported model ({type(error).__name__}: {error}). "
            f"{ADVICE}"
        ) from error
    for kind, (ids, vectors) in expected.items():
        for text, ours in zip(chosen, ids, strict=True):
            theirs = opened.ids(text, kind)
            if theirs != ours:
                raise ExportError(
                    f"{folder}: sentence-transformers reads other tokens than the model was trained on. {kind} "
                    f"{_shown(text)}: found {_shown(theirs)}, expected {_shown(ours)}. {ADVICE}"
                )
        distances = (opened.encode(chosen, kind) - vectors).norm(dim=1)
        worst = int(distances.argmax())
        if not distances[worst] <= LARGEST_DISTANCE[dtype]:
            raise ExportError(
                f"{folder}: sentence-transformers gives another vector than `lbr encode`. {kind} "
                f"{_shown(chosen[worst])}: found unit vectors {distances[worst]:.1e} apart, expected at most "
                f"{LARGEST_DISTANCE[dtype]}. {ADVICE}"
            )


def _shown(value: Any) -> str:
    """At most 80 characters of a value."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:38]} ... {shown[-37:]}"
