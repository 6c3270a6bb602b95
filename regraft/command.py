"""What every command shares: the options `--root` and `--json`, where words and JSON go, and how an error ends.

Words about progress go to stderr; the answer, or with `--json` one JSON object, goes to stdout.
"""

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.errors import Exit, ParamsError, RegraftError
from regraft.layout import Layout

Root = Annotated[
    Path, typer.Option("--root", help="The clone to work in: the folder with params.yaml.", envvar="REGRAFT_ROOT")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of words.")]
Remembering = Annotated[
    bool, typer.Option("--remembering", help="Give it away even if it was trained on rows that are to be forgotten.")
]


def clone(root: Path) -> Layout:
    """Make `root` the working directory and return its layout.

    Raises:
        ParamsError: it is not a clone of Regraft.
    """
    missing = [name for name in ("params.yaml", "dvc.yaml") if not (root / name).is_file()]
    if missing:
        raise ParamsError(
            f"{root.absolute()} is not a clone of Regraft: it has no {' and no '.join(missing)}",
            fix="run the command in a clone, or name one with --root",
        )
    os.chdir(root)
    listen()
    return Layout()


def answer(value: Any, lines: Sequence[str], *, as_json: bool) -> None:
    """Print a command's answer on stdout: `value` as JSON, or `lines` for a person."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, markup=False)


def progress(line: str) -> None:
    """Print a line about what is going on, for people, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def listen() -> None:
    """Show what the library logs on stderr, as plain lines."""
    log = logging.getLogger("regraft")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def refused(error: RegraftError, *, as_json: bool) -> int:
    """Report an error that was raised on purpose and return its exit code."""
    code = int(error.exit_code)
    if as_json:
        body = {"type": type(error).__name__, "message": error.message, "fix": error.fix, "exit_code": code}
        answer({"error": body}, [], as_json=True)
    sys.stderr.write(f"error: {error}\n")
    return code


def crashed(error: Exception, *, as_json: bool) -> int:
    """Report an error that nobody expected in one line, keep its trace in a file, and return exit code 1."""
    work = Layout().work
    folder = work if Layout().params.is_file() else Path(tempfile.gettempdir())
    trace = folder / "outcomes/command.txt" if folder == work else folder / f"regraft-{os.getpid()}.txt"
    text = "".join(traceback.format_exception(error))
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(text, encoding="utf-8")
        where = f"the trace is in {trace}"
    except OSError as problem:
        where = f"its trace could not be written: {problem.strerror}"
    first = (str(error).strip().splitlines() or [""])[0]
    message = f"{type(error).__name__}: {first}"
    fix = f"{where}; if the message does not help, it is a bug of Regraft"
    return refused(RegraftError(message, fix=fix), as_json=as_json)


def interrupted(*, as_json: bool) -> int:
    """Report that a signal ended the command, and return exit code 1."""
    error = RegraftError("interrupted; what was finished is kept", fix="run the same command again to go on")
    refused(error, as_json=as_json)
    return int(Exit.FAILED)
