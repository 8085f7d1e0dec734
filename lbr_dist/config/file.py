"""A `RunConfig` from a YAML file and ``--section.field=value``, with errors that name the file, line and key."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lbr_dist.config import Dtype, RunConfig, to_dict
from lbr_dist.errors import ConfigError
from lbr_dist.ranks.hardware import fitting_dtype
from lbr_dist.storage.files import make_private, write_atomic
from lbr_dist.storage.hub import cached_model


def _known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _known_keys(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")


def _did_you_mean(key: str) -> str:
    known = list(_known_keys(RunConfig))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        # maybe the right name in the wrong section
        close = [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    return f" Did you mean `{close[0]}`?" if close else " `lbr config` prints every key with its default."


def _key_lines(path: Path) -> dict[str, int]:
    """The line of each dotted key in a YAML file."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[prefix + str(key.value)] = key.start_mark.line + 1
                walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(path.read_text(encoding="utf-8")), "")
    return lines


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give the path of a YAML config; launch/configs/ has examples.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found {type(content).__name__}, expected sections and fields.")
    return content


def _check_keys(content: Mapping[str, Any], path: Path, lines: Mapping[str, int], prefix: str = "") -> None:
    known = set(_known_keys(RunConfig))
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise ConfigError(f"{path}:{lines.get(name, 1)}: unknown key `{name}`.{_did_you_mean(name)}")
        if isinstance(value, dict) and any(other.startswith(f"{name}.") for other in known):
            _check_keys(value, path, lines, f"{name}.")


def _parser() -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="lbr", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    return parser


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config, and override some of its fields.

    Args:
        path: a YAML file with `RunConfig`'s sections and fields. Paths in it are relative to the working folder.
        overrides: ``--section.field=value`` or ``--section.field value``, in order.

    Raises:
        ConfigError: the file can't be read, a key is unknown, or a value has the wrong type or is out of range.
    """
    import jsonargparse

    path = Path(path)
    content = _load(path)
    lines = _key_lines(path)
    _check_keys(content, path, lines)
    known = set(_known_keys(RunConfig))
    for argument in overrides:
        name = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and name not in known:
            raise ConfigError(f"--{name}: unknown key.{_did_you_mean(name)}")
    parser = _parser()
    try:
        parsed = parser.parse_args([f"--config={path}", *overrides])
        config = parser.instantiate_classes(parsed)
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
        return _with_cached_base(RunConfig(**values))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        message = str(error).strip()
        named = [name for name in lines if f'"{name}"' in message and not any(name in o for o in overrides)]
        place = f"{path}:{lines[max(named, key=len)]}: " if named else f"{path}: "
        raise ConfigError(f"{place}{message}") from None


def _with_cached_base(config: RunConfig) -> RunConfig:
    """With the folder in the Hugging Face cache as `model.base`, if that is the id of a model there."""
    cached = None if Path(config.model.base).exists() else cached_model(config.model.base)
    return config if cached is None else replace(config, model=replace(config.model, base=str(cached)))


def from_plain(content: Mapping[str, Any], where: Path) -> RunConfig:
    """The config from the plain dict that `to_dict` made.

    Args:
        content: sections and fields.
        where: the file that it is in, for messages.

    Raises:
        ConfigError: another version wrote it, or it is not a config.
    """
    import jsonargparse

    parser = _parser()
    try:
        config = parser.instantiate_classes(parser.parse_object(dict(content)))
        return RunConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{where}: this version of lbr-dist cannot read its config: {message}") from None


def settle_dtype(config: RunConfig, gpus: int | None) -> RunConfig:
    """The config with `model.dtype: auto` replaced: by what the run started with, else by what fits this machine.

    Args:
        config: the run.
        gpus: GPUs that the ranks use here, 0 for CPU ranks; None: they run elsewhere, and `auto` may stay.
    """
    if config.model.dtype != "auto":
        return config
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        found = yaml.safe_load((config.run_path / "config.yaml").read_text(encoding="utf-8"))["model"]["dtype"]
        if found in typing.get_args(Dtype):
            return config.with_dtype(found)
    return config if gpus is None else config.with_dtype(fitting_dtype(gpus))


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config, with every field."""
    make_private(path.parent)
    write_atomic(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def describe() -> str:
    """Every key with its type, default and meaning."""
    import ast
    import inspect
    import itertools

    out: list[str] = []

    def meanings(cls: type) -> dict[str, str]:
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        found = {}
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
        return found

    def walk(cls: type, prefix: str) -> None:
        hints, texts = typing.get_type_hints(cls), meanings(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            if dataclasses.is_dataclass(hint):
                out.append(f"\n{prefix}{field.name}: {texts.get(field.name, '')}")
                walk(typing.cast(type, hint), f"{prefix}{field.name}.")
                continue
            default = "required" if field.default is dataclasses.MISSING else f"default {field.default!r}"
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            out.append(f"  --{prefix}{field.name}  ({kind}, {default})\n      {texts.get(field.name, '')}")

    walk(RunConfig, "")
    return "\n".join(out)
