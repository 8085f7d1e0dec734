"""The `lbr` command. Each subcommand imports what it needs when it runs, so that `lbr --help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from lbr_dist import __version__
from lbr_dist.console import Say, say
from lbr_dist.errors import EXIT_INTERRUPTED, Interrupted, LbrError

Command = Callable[[argparse.Namespace, Say], int | None]


def _submit(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.slurm import submit

    submit.run(args, say)


def _cancel(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.slurm import cancel

    cancel.run(args, say)


def _config(args: argparse.Namespace, say: Say) -> None:
    from lbr_dist.config.file import describe

    say(describe())


def _parser(doctor_alone: bool = False) -> argparse.ArgumentParser:
    from lbr_dist.launch.doctor import command as doctor

    parser = argparse.ArgumentParser(
        prog="lbr",
        description="Learn Before Represent: turn a causal LLM into the embedding model of a domain.",
        epilog="Example: lbr run launch/configs/demo.yaml --ranks 2 --learn.steps=50",
    )
    parser.add_argument("--version", action="version", version=f"lbr-dist {__version__}")
    # deepspeed's launcher adds it before all other arguments; LOCAL_RANK has the same value
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def add_doctor() -> None:
        text = "Check this machine and its cluster: what a run can use, what is missing, and how to fix it."
        doctor.add_arguments(command("doctor", doctor.run, text))

    if doctor_alone:  # the other commands' options import packages, and the doctor must run when one is missing
        add_doctor()
        return parser
    from lbr_dist.launch.commands import checkpoints, data, encode, evaluate, logs, plan, status, train, versions
    from lbr_dist.slurm import arguments as slurm

    for name, run, text in (
        ("run", train.run, "Both stages, export, evaluation and report."),
        ("learn", train.learn, "Stage 1: causal language modelling through the bottleneck."),
        ("represent", train.represent, "Stage 2: contrastive training on the compressed vectors."),
    ):
        train.add_arguments(command(name, run, text))
    slurm.add_submit_arguments(command("submit", _submit, "Queue a run's stages on Slurm, as one chain of jobs."))
    text = "The state of a run, on this machine or on Slurm: steps, losses, time left, reasons, the result."
    status.add_arguments(command("status", status.run, text))
    logs.add_arguments(command("logs", logs.run, "What a run's ranks print, and its jobs if it was submitted."))
    text = "Cancel all jobs of a submitted run; what it has saved is kept."
    slurm.add_cancel_arguments(command("cancel", _cancel, text))
    text = "Estimate what a step of stage 2 costs on a cluster: memory, traffic, time."
    plan.add_arguments(command("plan", plan.run, text))
    text = "List, verify, export or prune the checkpoints of a run."
    checkpoints.add_arguments(command("checkpoints", checkpoints.run, text))
    add_doctor()
    command("versions", versions.run, "Print the versions that a bug report needs.")
    command("config", _config, "Print every key of a config with its default and meaning.")
    evaluate.add_arguments(command("evaluate", evaluate.run, "Score a model folder on held-out pairs, next to BM25."))
    encode.add_arguments(command("encode", encode.run, "Encode a collection as vectors, in .npy or .parquet."))
    data.add_arguments(command("data", data.run, "Build a domain's data, or the base model of the demo."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a user's error; 2 for a wrong command line; 75 for a run that was asked to stop and
        saved a checkpoint; 130 for a second Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(doctor_alone=given[:1] == ["doctor"])
    args, rest = parser.parse_known_args(given)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.given, args.overrides = given, rest
    try:
        code: int | None = args.run(args, say)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except LbrError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Name a path that can be read and written.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start the run again to resume from its last checkpoint", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
