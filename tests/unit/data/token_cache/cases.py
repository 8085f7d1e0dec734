"""A small corpus, and builds of its token cache, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbr_dist.data.token_cache.build import build
from lbr_dist.data.token_cache.cache import TokenCache
from lbr_dist.data.tokenizer import TextTokenizer
from tests import tiny

ROWS = [
    {"id": str(i), "text": f"{text} \n", "title": f"Title {i}"}
    for i, text in enumerate(list(tiny.texts().values()) * 3)
]


DRIVER = """
import os, shutil, signal, sys, time
from pathlib import Path
from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache import part as token_parts
from lbr_dist.storage import whole_folder
from lbr_dist.errors import LbrError

real = token_parts.write_part

def before(action):
    def write_part(unit, *arguments):
        action(unit)
        return real(unit, *arguments)
    build_tokens.write_part = write_part

def write_tokenizer(folder, to, max_characters):
    # the same as the real one, without the seconds that importing transformers takes
    shutil.copy(folder / "tokenizer.json", to)
    return token_parts.TokenRules("<u2", max_characters, False)

def slow(unit):
    time.sleep(0.02)

def killed(unit):
    if unit.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)

def lockless(*arguments):
    raise OSError(whole_folder.errno.ENOLCK, "No locks available")

if __name__ == "__main__":
    corpus, tokenizer, cache, processes, *modes = sys.argv[1:]
    build_tokens._UNIT, build_tokens._SMALL = 3000, 0
    build_tokens._write_tokenizer = write_tokenizer
    for action in (slow, killed):
        if action.__name__ in modes:
            before(action)
    if "lockless" in modes:
        whole_folder.fcntl.flock = lockless
    try:
        made = build_tokens.build(Path(corpus), Path(tokenizer), Path(cache), int(processes), print)
    except LbrError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(made.folder)
"""


def jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def made(corpus: Path, tokenizer: Path, cache: Path, processes: int = 1, **more: Any) -> TokenCache:
    return build(corpus, tokenizer, cache, processes, more.pop("say", lambda text: None), **more)


def expected(tokenizer: Path, rows: list[dict[str, str]] = ROWS) -> list[tuple[int, ...]]:
    return TextTokenizer(tokenizer).encode([f"{row['title']} {row['text']}" for row in rows])


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "hashes")
