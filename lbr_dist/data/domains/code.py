"""Code: functions of Python's standard library, searched by the first paragraph of their docstrings.

A document is a function without its name and docstring. The texts come from the Python that runs this, so they
differ slightly between versions; the manifest names the version.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lbr_dist.data.domains.domain import (
    MAX_NEGATIVES,
    Domain,
    Source,
    Split,
    hash_order,
    hash_split,
    normalise,
    small_evaluation,
    word_features,
)
from lbr_dist.data.records import Pair
from lbr_dist.errors import DataError

DEV_SHARE, TEST_SHARE = 0.08, 0.2
QUERY_WORDS = (5, 60)
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclass(frozen=True, slots=True)
class Function:
    """One documented function."""

    id: str
    module: str
    query: str
    """First paragraph of the docstring, on one line."""
    body: str
    """Source without the name and the docstring."""
    source: str
    """Unchanged source."""


def build(folder: Path | None = None) -> Domain:
    """The code domain, from this Python's standard library or from another folder of Python files.

    Raises DataError if there are no documented functions, as in a Python that keeps its library in an archive.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    functions = list(_functions(folder))
    if not functions:
        raise DataError(
            f"{folder}: found no Python function with a docstring, expected the standard library's source files. "
            "Use a Python that is installed with its source."
        )
    splits = {each.id: hash_split(_family(each.module), "code split", DEV_SHARE, TEST_SHARE) for each in functions}
    unique: dict[str, str] = {}
    for each in functions:
        unique.setdefault(each.body, each.id)
    documents = {document: body for body, document in unique.items()}
    held_out = {unique[each.body] for each in functions if splits[each.id] != "train"}
    texts = {
        f"{each.id}:source": each.source
        for each in functions
        if splits[each.id] == "train" and unique[each.body] not in held_out
    }
    pairs = _pairs(functions, splits, unique)
    small_test, small_documents = small_evaluation(pairs["test"], documents, word_features, "code small")
    return Domain(
        name="code",
        documents=documents,
        corpus=documents | texts,
        train=pairs["train"],
        dev=pairs["dev"],
        test=pairs["test"],
        small_test=small_test,
        small_documents=small_documents,
        sources=[
            Source(
                package="Python standard library",
                version=platform.python_version(),
                content="documented functions; other versions of Python give other texts",
                licence="PSF-2.0",
                attribution="Python Software Foundation and contributors",
            )
        ],
        split_rule=(
            "By top-level module or package, assigned to train, dev or test by a hash; a module and its counterpart "
            "in plain Python (decimal and _pydecimal) stay together. Docstrings found in several splits give no query."
        ),
        corpus_rule=(
            "All documents (functions without name and docstring), and the training modules' functions unchanged. "
            "No docstring of a held-out module."
        ),
    )


def _pairs(functions: list[Function], splits: dict[str, Split], unique: dict[str, str]) -> dict[Split, list[Pair]]:
    modules: dict[str, list[str]] = defaultdict(list)
    asked: dict[str, list[Function]] = defaultdict(list)
    owners: dict[str, set[Split]] = defaultdict(set)
    for each in functions:
        modules[each.module].append(unique[each.body])
        asked[normalise(each.query)].append(each)
        owners[unique[each.body]].add(splits[each.id])
    pairs: dict[Split, list[Pair]] = {"train": [], "dev": [], "test": [], "none": []}
    for found in asked.values():
        query = found[0].query
        positives = tuple(dict.fromkeys(unique[each.body] for each in found))
        of = {split for document in positives for split in owners[document]}
        split: Split = of.pop() if len(of) == 1 else "none"
        alike = dict.fromkeys(near for each in found for near in modules[each.module])
        pool = [near for near in alike if near not in positives and owners[near] == {split}]
        negatives = hash_order(pool, f"code negatives {query}")[:MAX_NEGATIVES]
        source = found[0].module.partition(".")[0]
        pairs[split].append(Pair(f"code-{split}-{len(pairs[split])}", query, positives, tuple(negatives), source))
    return pairs


def _family(module: str) -> str:
    """The top-level name, without the prefix that marks the internal or plain-Python half of a module."""
    return re.sub(r"^_+(py(?=[a-z]{2}))?", "", module.partition(".")[0])


def _functions(folder: Path) -> Iterator[Function]:
    """Documented functions of all files, ordered by file and line."""
    taken: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if _SKIPPED & set(relative.parts):
            continue
        try:
            with warnings.catch_warnings(), tokenize.open(path) as file:
                warnings.simplefilter("ignore")
                source = file.read()
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            # the library contains a few files that are broken on purpose
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        lines = source.splitlines()
        for name, node in _definitions(tree, ""):
            query = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            body = _without_docstring(node, lines)
            if body is None or not QUERY_WORDS[0] <= len(query.split()) <= QUERY_WORDS[1]:
                continue
            key = f"{module}:{name}"
            taken[key] = taken.get(key, 0) + 1
            whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield Function(key if taken[key] == 1 else f"{key}#{taken[key]}", module, query, body, whole)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt):
            yield from _definitions(child, prefix)


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The function, renamed to `f`, or None if it has no other statement or its docstring shares a line with code."""
    first = node.body[0]
    if len(node.body) < 2 or first.lineno == node.lineno or first.end_lineno == node.body[1].lineno:
        return None
    assert first.end_lineno is not None and node.end_lineno is not None
    kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    # recursive calls are renamed too; a special method's name stays in the body, where super() calls use it
    times = 1 if node.name.startswith("__") else 0
    return re.sub(rf"\b{re.escape(node.name)}\b", "f", textwrap.dedent("\n".join(kept)), count=times).strip()
