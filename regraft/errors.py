"""Everything that Regraft raises on purpose.

    RegraftError                     exit code 1
    ├── ParamsError (ValueError)     2  params.yaml or a command's arguments are wrong
    ├── DataError (ValueError)       1  an input file cannot be read as what it should be
    ├── MissingInput                 1  a file that an earlier step makes is not there
    ├── DamagedArtifact (ValueError) 1  bytes differ from their manifest, or an adapter is unfit to load
    ├── ResumeRefused                1  a checkpoint was made from other inputs
    ├── PinMismatch                  1  base model or tokenizer differ from the pinned ones
    ├── ServiceUnavailable           1  MLflow, Prefect or a remote does not answer
    ├── StageFailed                  *  a stage ended with an error of its own; carries that stage's exit code
    ├── GateRefused                  3  a gate said no
    │   └── TrainingDiverged         3  a loss or gradient that is not finite
    ├── Busy (BlockingIOError)       4  another run holds what is needed
    └── Preempted                    5  stopped by a signal, after a checkpoint

Every message says what was found and what was expected; `fix` is the next command or change.
"""

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of every command and stage."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    BUSY = 4
    PREEMPTED = 5


class RegraftError(Exception):
    """Base of all errors raised on purpose; a command prints `str(error)` and exits with `error.exit_code`."""

    exit_code: ClassVar[int] = Exit.FAILED

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  next: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.fix)


def _rebuild(kind: type[RegraftError], message: str, fix: str | None) -> RegraftError:
    return kind(message, fix=fix)


class ParamsError(RegraftError, ValueError):
    """`params.yaml` or a command's arguments are wrong; the message lists all mistakes."""

    exit_code = Exit.USAGE


class DataError(RegraftError, ValueError):
    """An input file cannot be read as what it should be."""


class MissingInput(RegraftError, FileNotFoundError):
    """A file that an earlier step makes is not there."""


class DamagedArtifact(RegraftError, ValueError):
    """Bytes differ from their manifest, or an artefact is unfit to load."""


class ResumeRefused(RegraftError):
    """A checkpoint was made from other inputs than the present ones."""


class PinMismatch(RegraftError, ValueError):
    """The base model or tokenizer at hand is not the one that was pinned."""


class ServiceUnavailable(RegraftError, ConnectionError):
    """A service does not answer, or answers with an error; the step can be repeated."""


class GateRefused(RegraftError):
    """A gate said no: evidence is missing, stale, unreadable or against it."""

    exit_code = Exit.REFUSED


class TrainingDiverged(GateRefused, ArithmeticError):
    """A loss or gradient was not finite."""


class Busy(RegraftError, BlockingIOError):
    """Another run holds what this one needs."""

    exit_code = Exit.BUSY


class Preempted(RegraftError):
    """Stopped by a signal, after a checkpoint was written."""

    exit_code = Exit.PREEMPTED


class StageFailed(RegraftError):
    """A stage that ran as a process of its own ended with an error; `code` is the stage's own exit code."""

    def __init__(self, message: str, *, fix: str | None = None, stage: str = "", code: int = Exit.FAILED) -> None:
        super().__init__(message, fix=fix)
        self.stage = stage
        self.code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """The stage's own exit code."""
        return self.code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_stage, (self.message, self.fix, self.stage, self.code)


def _rebuild_stage(message: str, fix: str | None, stage: str, code: int) -> StageFailed:
    return StageFailed(message, fix=fix, stage=stage, code=code)
