"""The errors that a user's mistake raises, and the exit codes; any other exception is a bug of this program.

Each message names the field or file (and line), what was found, what was expected, and what to do.
"""

from __future__ import annotations

EXIT_USER_ERROR = 2
"""A rank's exit code for an `LbrError`, whose message it has printed."""

EXIT_HUNG = 70  # EX_SOFTWARE
"""The exit code of a rank that made no progress and ended itself."""

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL
"""The exit code of a command whose run was asked to stop and saved its state: start it again to resume."""


class LbrError(Exception):
    """Base of every error that the user can fix; the command line prints it without a traceback.

    Args:
        message: what is printed.
        reason: the same in one line, for the status of a run; by default, the message's first line.
    """

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message.split("\n")[0]


class ConfigError(LbrError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(LbrError):
    """A data file is missing, empty or malformed."""


class ModelError(LbrError):
    """A model folder cannot be used as it is."""


class CheckpointError(LbrError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ExportError(LbrError):
    """Other software would make something else of an exported model than we do."""


class LaunchError(LbrError):
    """The ranks could not be started, or one of them died."""


class TrainingError(LbrError):
    """The training itself fails: gradients are not finite, or spike again and again."""


class RefusedStep(TrainingError):
    """One step cannot be taken, on any rank: nothing of it has been applied, and training may continue."""


class Interrupted(LbrError):
    """The run was asked to stop and did, with a checkpoint; started again, it resumes."""
