"""Resume from a checkpoint: the newest intact one, the same on all ranks, on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_dist.checkpoint import shards
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest, tag
from lbr_dist.checkpoint.saver import restore_random_state, versions
from lbr_dist.config import RunConfig, to_dict
from lbr_dist.config.changes import CHANGES_NO_RESULT, forbidden_changes
from lbr_dist.console import Say, say_aside, silent
from lbr_dist.engine import Engine
from lbr_dist.errors import CheckpointError
from lbr_dist.ranks.group import Ranks, from_first, together
from lbr_dist.storage.files import others_who_write


def resume(
    engine: Engine, checkpoints: Checkpoints, ranks: Ranks, config: RunConfig, base: dict[str, str]
) -> dict[str, Any] | None:
    """Find the checkpoint that `checkpoint.resume` asks for, verify it and load it.

    Returns:
        The training loop's state; None if the stage starts from scratch.

    Raises:
        CheckpointError: if no such checkpoint exists or is intact, if other users can write to the folder, or if the
            checkpoint does not fit this run.
    """
    say = say_aside if ranks.is_first else silent
    wanted = config.checkpoint.resume
    left, steps = on_first(lambda: (checkpoints.clean(), checkpoints.steps()), ranks)
    for name in left:
        say(f"note: removed {checkpoints.path / name}, which was never completed")
    if wanted == "never":
        if steps:
            places = _set_aside(checkpoints, steps, "checkpoint.resume never", ranks)
            say(f"starting from scratch; moved {_list(steps)} to {places[0].parent}")
        return None
    if isinstance(wanted, int) and wanted not in steps:
        raise CheckpointError(
            f"checkpoint.resume: found {wanted}, but {checkpoints.path} has {_list(steps)}. Use one of these, or "
            "`auto`."
        )
    if not steps:
        if wanted == "required":
            raise CheckpointError(
                f"checkpoint.resume: found 'required', but {checkpoints.path} has no checkpoint. Use `auto` to start "
                "from scratch."
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
            say(f"note: {checkpoints.folder(step)} was saved with {', '.join(other)}: rounding may differ from here on")
        began = time.perf_counter()
        _load(engine, manifest, checkpoints.folder(step), ranks)
        newer = [other for other in steps if other > step] if step == wanted else []
        if newer:
            _set_aside(checkpoints, newer, f"left behind by checkpoint.resume {step}", ranks)
            say(f"note: set aside newer checkpoints: {_list(newer)}")
        reshaped = "" if manifest.world_size == ranks.world_size else f"saved by {manifest.world_size} ranks, now "
        say(
            f"resumed after step {step} from {checkpoints.folder(step)} ({reshaped}{ranks.world_size} ranks; "
            f"{manifest.num_bytes / 2**20:,.0f} MiB, saved at {manifest.saved_at}; "
            f"loaded in {time.perf_counter() - began:.1f} s)"
        )
        return manifest.state
    raise CheckpointError(
        f"{checkpoints.path}: all of its checkpoints are damaged, so the run cannot resume. See the messages above. "
        "To start from scratch, use --checkpoint.resume=never."
    )


def _list(steps: list[int]) -> str:
    return ", ".join(tag(step) for step in steps) or "no checkpoint"


def on_first(work: Callable[[], Any], ranks: Ranks) -> Any:
    """Run `work` on the first rank; return its result on every rank.

    Raises:
        CheckpointError: on every rank, if `work` raises it or an OSError.
    """
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
    """Verify a checkpoint; each rank reads some of its files. Returns its manifest or the problem, on every rank."""

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


def _set_damaged_aside(checkpoints: Checkpoints, step: int, problem: str, ranks: Ranks, say: Say) -> None:
    """Warn about a damaged checkpoint, and set it aside."""
    place = ""
    if ranks.is_first:
        try:
            place = f"; it is set aside as {checkpoints.set_aside(step, problem)}"
        except OSError as error:
            place = f"; it cannot be set aside ({error.strerror})"
    say(f"warning: {checkpoints.folder(step)} is damaged: {problem.rstrip('.')}{place}")


def _refuse_writable(config: RunConfig, checkpoints: Checkpoints, steps: list[int]) -> None:
    """Check that no other user could have changed what is read.

    Raises:
        CheckpointError: if one could; names the path, and who.
    """
    places = [config.run_path, checkpoints.path.parent, checkpoints.path]
    for step in steps:
        places += [checkpoints.folder(step), *checkpoints.folder(step).iterdir()]
    for place in places:
        who = others_who_write(place, config.checkpoint.trust_group)
        if who is not None:
            group = ", or trust the group with --checkpoint.trust_group=true" if "group" in who else ""
            raise CheckpointError(
                f"{place}: can be changed by {who}, so the state in it cannot be trusted. Check its content, then run "
                f"`chmod -R go-w {config.run_path}` as its owner{group}."
            )


def _refuse_other(manifest: Manifest, config: RunConfig, base: dict[str, str], folder: Path) -> None:
    """Check that a checkpoint was saved with this run's config and base model.

    Raises:
        CheckpointError: if not; names the fields or files that differ, and the fields that may.
    """
    names = forbidden_changes(manifest.config, to_dict(config))
    if names:
        raise CheckpointError(
            f"{folder}: was saved with another config; it differs in {', '.join(names)}. Its state does not fit these "
            f"settings. Set them back, or use another run_dir. What may differ: {', '.join(CHANGES_NO_RESULT)}."
        )
    changed = [name for name in manifest.base if base.get(name) != manifest.base[name]]
    if changed:
        raise CheckpointError(
            f"{folder}: was saved with another {', '.join(changed)} in the folder that the model came from. Restore "
            "the files that the run started with, or use another run_dir."
        )


def _load(engine: Engine, manifest: Manifest, folder: Path, ranks: Ranks) -> None:
    expected = engine.shapes()
    if expected != manifest.parameters:
        names = [n for n in {**expected, **manifest.parameters} if expected.get(n) != manifest.parameters.get(n)]
        raise CheckpointError(
            f"{folder}: its parameters differ from this model's: {', '.join(sorted(names)[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. It was saved by another version or model."
        )
    with shards.ShardReader(folder, manifest.parameters, manifest.world_size) as reader:
        engine.restore(reader.pieces, manifest.state["optimizer_steps"])
        if ranks.world_size == manifest.world_size:
            restore_random_state(*reader.of_rank(ranks.rank), ranks)
