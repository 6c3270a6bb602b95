"""How a pure stage runs as a process (`python -m regraft.STAGE`): one at a time, with an outcome that survives DVC.

DVC turns every failure into 255, so the stage writes its own exit code and error to `data/work/outcomes/STAGE.json`.
A stage whose starter has died (DVC, the CLI or a flow killed with -9) gets a SIGTERM within about a second, so that no
second trainer ever runs beside an orphan.
"""

import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel

from regraft.artifacts import hold, write_json
from regraft.errors import Busy, Exit, Preempted, RegraftError
from regraft.layout import Layout
from regraft.params import load_sections

_Sections = TypeVar("_Sections", bound=BaseModel)
log = logging.getLogger("regraft")
_SPINS = "10000"
"""How long a thread that waits spins before it sleeps (tens of microseconds; libgomp's own is a hundred times that).

Two threads of a tiny model on two idle cores trained 1.36 times as fast as with threads that sleep at once (0.95 of
spinning without end); on two busy cores, spinning without end made a step nine times slower.
"""


def run_stage(name: str, sections: type[_Sections], body: Callable[[_Sections, Layout], object]) -> int:
    """Run a stage in the present clone and return its exit code.

    Args:
        name: the stage, one of `regraft.layout.STAGES`.
        sections: a model with one field for each section of `params.yaml` that the stage reads.
        body: the stage; gets the parameters and the paths.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    layout = Layout()
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when torch loads OpenMP
    caller = int(os.environ["REGRAFT_CALLER"]) if "REGRAFT_CALLER" in os.environ else None
    try:
        with hold(layout.lock(name), f"the stage `{name}`", {"caller": caller or os.getppid()}):
            return _run_held(name, layout, caller, lambda: body(load_sections(layout.params, sections), layout))
    except Busy as error:  # the outcome belongs to the run that holds the lock
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - the stage is a command
        return error.exit_code


def _run_held(name: str, layout: Layout, caller: int | None, body: Callable[[], object]) -> int:
    started, clock = datetime.now(UTC), time.monotonic()
    code, error = int(Exit.DONE), None
    try:
        follow_starter(caller)
        body()
    except RegraftError as failure:
        code, error = failure.exit_code, _described(failure, failure.message, failure.fix)
    except KeyboardInterrupt as failure:
        code, error = int(Exit.FAILED), _described(failure, "interrupted", "run the same command again")
    except Exception as failure:  # noqa: BLE001 - the process boundary: the trace goes to the outcome, not to a user
        fix = f"read the trace in {layout.outcome(name)}; if it does not help, this is a bug of Regraft"
        code, error = int(Exit.FAILED), _described(failure, f"{type(failure).__name__}: {failure}", fix)
        error["trace"] = traceback.format_exc()
    if error is not None:
        print(f"{name}: {error['message']}\n  next: {error['fix']}", file=sys.stderr)  # noqa: T201
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcome = {
        "stage": name,
        "exit_code": code,
        "error": error,
        "run": os.environ.get("REGRAFT_RUN"),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
    }
    try:
        write_json(layout.outcome(name), outcome)
    except OSError as failure:
        print(f"{name}: the outcome could not be written: {failure}", file=sys.stderr)  # noqa: T201
    return code


def _described(failure: BaseException, message: str, fix: str | None) -> dict[str, Any]:
    return {"type": type(failure).__name__, "message": message, "fix": fix}


def follow_starter(caller: int | None) -> None:
    """Send this process a SIGTERM when the process that started it, or a DVC between them, is gone."""
    import psutil

    chain: list[psutil.Process] = []
    for parent in psutil.Process().parents():
        is_dvc = "dvc" in " ".join(_command_line(parent))
        if not chain or is_dvc or parent.pid == caller:
            chain.append(parent)
        if parent.pid == caller or (caller is None and len(chain) > 1 and not is_dvc):
            break
    if caller is not None and all(parent.pid != caller for parent in chain):
        raise Preempted(f"process {caller}, which started this stage, is gone", fix="run the same command again")

    def watch() -> None:
        try:
            while all(parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE for parent in chain):
                time.sleep(0.5)
        except psutil.Error as error:
            log.debug("a parent vanished while it was looked at: %s", error)
        log.warning("the process that started this stage is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="follow-starter").start()


def _command_line(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
