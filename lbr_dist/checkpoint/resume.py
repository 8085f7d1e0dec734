"""Going on from a checkpoint: the newest one that is what was written, on any number of ranks, alike on all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_dist.checkpoint import shards
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest, tag
from lbr_dist.checkpoint.saver import restore_random_state, versions
from lbr_dist.config import RunConfig, to_dict
from lbr_dist.config.changes import CHANGES_NO_RESULT, forbidden_changes
from lbr_dist.engine import Engine
from lbr_dist.errors import CheckpointError
from lbr_dist.ranks.group import Ranks, from_first, together
from lbr_dist.storage.files import others_who_write


def resume(
    engine: Engine, checkpoints: Checkpoints, ranks: Ranks, config: RunConfig, base: dict[str, str]
) -> dict[str, Any] | None:
    """Find a checkpoint as `checkpoint.resume` says, verify and load it.

    Returns:
        The state that the loop goes on with; None where the stage begins.

    Raises:
        CheckpointError: none that is asked for is there or whole; others can write the folder; or the state means
            nothing to this run.
    """
    say = _say if ranks.is_first else (lambda message: None)
    wanted = config.checkpoint.resume
    left, steps = on_first(lambda: (checkpoints.clean(), checkpoints.steps()), ranks)
    for name in left:
        say(f"note: {checkpoints.path / name} was never completed, and is removed")
    if wanted == "never":
        if steps:
            places = _set_aside(checkpoints, steps, "checkpoint.resume never", ranks)
            say(f"begins anew; {_list(steps)}: set aside in {places[0].parent}")
        return None
    if isinstance(wanted, int) and wanted not in steps:
        raise CheckpointError(
            f"checkpoint.resume: found {wanted}, but {checkpoints.path} has {_list(steps)}. Name one of these, or "
            "`auto`."
        )
    if not steps:
        if wanted == "required":
            raise CheckpointError(
                f"checkpoint.resume: found 'required', but {checkpoints.path} has no checkpoint. Use `auto` to begin."
            )
        return None
    on_first(lambda: _refuse_writable(config, checkpoints, steps), ranks)
    for step in [wanted] if isinstance(wanted, int) else reversed(steps):
        manifest, problem = _verify(checkpoints, step, ranks)
        if manifest is None:
            if step == wanted:
                others = [other for other in steps if other != step]
                raise CheckpointError(f"{problem.rstrip('.')}. {checkpoints.path} also has {_list(others)}.")
            _set_damaged_aside(checkpoints, step, problem, ranks, say)
            continue
        _refuse_other(manifest, config, base, checkpoints.folder(step))
        here = versions()
        other = [f"{name} {found}" for name, found in manifest.versions.items() if here.get(name) != found]
        if other:
            say(f"note: {checkpoints.folder(step)} was saved with {', '.join(other)}: roundings may differ from now on")
        began = time.perf_counter()
        _load(engine, manifest, checkpoints.folder(step), ranks)
        newer = [other for other in steps if other > step] if step == wanted else []
        if newer:
            _set_aside(checkpoints, newer, f"left behind by checkpoint.resume {step}", ranks)
            say(f"note: {_list(newer)} are newer, and set aside")
        reshaped = "" if manifest.world_size == ranks.world_size else f"saved by {manifest.world_size} ranks, now "
        say(
            f"resumed after step {step} from {checkpoints.folder(step)} ({reshaped}{ranks.world_size} ranks; "
            f"{manifest.num_bytes / 2**20:,.0f} MiB of {manifest.saved_at}; {time.perf_counter() - began:.1f} s)"
        )
        return manifest.state
    raise CheckpointError(
        f"{checkpoints.path}: none of its checkpoints is what was written, so the run cannot go on. Look at the "
        "messages above; to begin anew, start with --checkpoint.resume=never."
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _list(steps: list[int]) -> str:
    return ", ".join(tag(step) for step in steps) or "no checkpoint"


def on_first(work: Callable[[], Any], ranks: Ranks) -> Any:
    """What `work` returns on the first rank, or the error of a user's mistake that it raises, on every rank."""
    answer: list[Any] = [None, None]
    if ranks.is_first:
        try:
            answer[0] = work()
        except CheckpointError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"{error.filename}: {error.strerror}."
    answer = from_first(answer, ranks)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def _set_aside(checkpoints: Checkpoints, steps: list[int], why: str, ranks: Ranks) -> list[Path]:
    places: list[Path] = on_first(lambda: [checkpoints.set_aside(step, why) for step in steps], ranks)
    return places


def _verify(checkpoints: Checkpoints, step: int, ranks: Ranks) -> tuple[Manifest | None, str]:
    """Read a checkpoint, each rank some of its files. Returns its manifest, or what is wrong; on every rank alike."""

    def look() -> tuple[Manifest | None, str]:
        try:
            return checkpoints.read(step), ""
        except CheckpointError as error:
            return None, str(error)

    manifest, problem = on_first(look, ranks)
    if manifest is None:
        return None, problem
    names = sorted(manifest.files)
    problems = together(checkpoints.damaged_files(manifest, names[ranks.rank :: ranks.world_size]), ranks)
    return (None, "; ".join(problems)) if problems else (manifest, "")


def _set_damaged_aside(
    checkpoints: Checkpoints, step: int, problem: str, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Name a damaged checkpoint, and take it out of the way."""
    place = ""
    if ranks.is_first:
        try:
            place = f"; it is set aside as {checkpoints.set_aside(step, problem)}"
        except OSError as error:
            place = f"; it cannot be set aside ({error.strerror})"
    say(f"warning: {checkpoints.folder(step)} is damaged: {problem.rstrip('.')}{place}")


def _refuse_writable(config: RunConfig, checkpoints: Checkpoints, steps: list[int]) -> None:
    """Refuse where another user could have changed what is read.

    Raises:
        CheckpointError: names the place, and who.
    """
    places = [config.run_path, checkpoints.path.parent, checkpoints.path]
    for step in steps:
        places += [checkpoints.folder(step), *checkpoints.folder(step).iterdir()]
    for place in places:
        who = others_who_write(place, config.checkpoint.trust_group)
        if who is not None:
            group = ", or trust it with --checkpoint.trust_group=true" if "group" in who else ""
            raise CheckpointError(
                f"{place}: can be changed by {who}, so the state in it cannot be trusted. Look at what is there; then "
                f"`chmod -R go-w {config.run_path}`, as its owner{group}."
            )


def _refuse_other(manifest: Manifest, config: RunConfig, base: dict[str, str], folder: Path) -> None:
    """Refuse a state that means nothing to this run.

    Raises:
        CheckpointError: names the fields or files that differ, and what may.
    """
    names = forbidden_changes(manifest.config, to_dict(config))
    if names:
        raise CheckpointError(
            f"{folder}: was saved with another config; it differs in {', '.join(names)}. Its state means nothing with "
            f"these. Set them back, or begin another run_dir. What may differ: {', '.join(CHANGES_NO_RESULT)}."
        )
    changed = [name for name in manifest.base if base.get(name) != manifest.base[name]]
    if changed:
        raise CheckpointError(
            f"{folder}: was saved with another {', '.join(changed)} in the folder that the model came from. Put back "
            "what the run began with, or begin another run_dir."
        )


def _load(engine: Engine, manifest: Manifest, folder: Path, ranks: Ranks) -> None:
    expected = engine.shapes()
    if expected != manifest.parameters:
        names = [n for n in {**expected, **manifest.parameters} if expected.get(n) != manifest.parameters.get(n)]
        raise CheckpointError(
            f"{folder}: holds other parameters than this model has: {', '.join(sorted(names)[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. It is of another version or model."
        )
    with shards.ShardReader(folder, manifest.parameters, manifest.world_size) as reader:
        engine.restore(reader.pieces, manifest.state["optimizer_steps"])
        if ranks.world_size == manifest.world_size:
            restore_random_state(*reader.of_rank(ranks.rank), ranks)
