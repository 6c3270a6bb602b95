"""Running the pure stages through DVC, and asking DVC what would run.

DVC is the only writer of `dvc.lock`. A stage runs as `dvc repro --single-item STAGE` in a process group of its own:
its memory is given back, a crash is contained, and a signal reaches all of it. DVC turns every failure into 255 and
deletes outputs before it runs a stage, so `repro` reads the stage's own outcome and restores the outputs.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import is_held, lock_holder
from regraft.errors import Busy, Exit, MissingInput, Preempted, RegraftError, StageFailed
from regraft.layout import STAGES, Layout

UPSTREAM: dict[str, tuple[str, ...]] = {
    "model": (),
    "validate": (),
    "preprocess": ("model", "validate"),
    "train": ("model", "validate", "preprocess"),
    "evaluate": ("model", "validate", "preprocess", "train"),
}
"""Every stage that must be up to date before a stage runs; a contract test compares with `dvc.yaml`."""

_GRACE = 60.0  # seconds that a signalled stage has for its checkpoint; it needs one step
_PATIENCE = 30.0  # seconds that DVC's own lock is waited for
_LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked", re.IGNORECASE)
_running: set[int] = set()
_stopped = threading.Event()


@dataclass(frozen=True)
class StageResult:
    """What `repro` did: `ran` is False where DVC found the stage unchanged or restored it from its cache."""

    stage: str
    ran: bool
    seconds: float


def repro(layout: Layout, stage: str, *, echo: Callable[[str], None] | None = None) -> StageResult:
    """Bring one stage up to date; its inputs must be there already.

    Args:
        layout: the clone.
        stage: one of `regraft.layout.STAGES`.
        echo: gets each line that DVC and the stage print.

    Raises:
        StageFailed: the stage ended with an error; it carries the stage's own message and exit code.
        Busy: another live run holds the stage, or DVC's lock for longer than half a minute.
        Preempted: a signal stopped the stage; run again to resume.
        KeyboardInterrupt, TimeoutError: as they came; the stage has ended and its last outputs are back.
    """
    _wait_for_orphan(layout, stage)
    began = time.monotonic()
    while True:
        run = secrets.token_hex(8)
        try:
            code, tail = _run_group(layout, [*_dvc(), "repro", "--single-item", stage], run, echo)
        except BaseException:  # a second Ctrl-C, a timeout: what DVC deleted comes back here too
            _wait_for_release(layout, stage)
            restore(layout, stage)
            raise
        if code == 0:
            return StageResult(stage, _outcome(layout, stage, run) is not None, time.monotonic() - began)
        _wait_for_release(layout, stage)
        outcome = _outcome(layout, stage, run)
        if outcome is not None or not any(_LOCKED.search(line) for line in tail):
            break
        if time.monotonic() - began > _PATIENCE:
            raise Busy(
                f"DVC is busy with `{stage}`: {tail[-1]}", fix="wait for the other run, then run the same command again"
            )
        time.sleep(1.0)
    restore(layout, stage)
    raise _failure(stage, code, outcome, tail)


def run_module(layout: Layout, name: str, arguments: list[str], *, echo: Callable[[str], None] | None = None) -> None:
    """Run `python -m regraft.NAME` in the clone, in a process group of its own; for heavy steps outside `dvc.yaml`.

    Raises:
        StageFailed, Busy, Preempted: as the process's own outcome says.
    """
    run = secrets.token_hex(8)
    code, tail = _run_group(layout, [sys.executable, "-m", f"regraft.{name}", *arguments], run, echo)
    if code:
        _wait_for_release(layout, name)
        raise _failure(name, code, _outcome(layout, name, run), tail)


def restore(layout: Layout, stage: str) -> bool:
    """Put back the outputs of a stage's last success from DVC's cache; False where there is nothing to put back."""
    done = subprocess.run(
        [*_dvc(), "checkout", "--quiet", "--force", stage],
        cwd=layout.root,
        env=_environment(),
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def changed(layout: Layout) -> dict[str, list[str]]:
    """Return the stages that would run, in order, each with its reasons; empty where everything is up to date.

    Raises:
        Busy: a live run works on a stage.
        RegraftError: DVC cannot say (`dvc.yaml` damaged, no DVC here).
    """
    done = _status(layout)
    try:
        status = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        status = None
    if not isinstance(status, dict):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RegraftError(
            f"DVC cannot say what changed: {last}", fix="run `dvc status` in the clone and mend what it says"
        )
    reasons: dict[str, list[str]] = {}
    for stage in STAGES:
        own = [line for entry in status.get(stage, []) for line in _reasons(entry)]
        upstream = [f"`{name}` runs before it" for name in UPSTREAM[stage] if name in reasons]
        if own or upstream:
            reasons[stage] = own or upstream
    return reasons


def _status(layout: Layout) -> "subprocess.CompletedProcess[str]":
    """Ask `dvc status`; a run whose starter was killed is given the time to write its checkpoint and end."""
    command = [*_dvc(), "status", "--json"]
    deadline = time.monotonic() + _GRACE
    while True:
        done = subprocess.run(command, cwd=layout.root, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode == 0 or not _LOCKED.search(done.stderr):
            return done
        for stage in STAGES:
            _wait_for_orphan(layout, stage)
        if time.monotonic() > deadline:
            raise Busy("DVC is busy in this clone", fix="wait for the other run, then run the same command again")
        time.sleep(1.0)


def expected_seconds(layout: Layout, stage: str) -> float | None:
    """How long the stage took when it last ran to its end; None if that is not known."""
    path = layout.outcome(stage)
    try:
        outcome = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return float(outcome["seconds"]) if outcome.get("exit_code") == Exit.DONE else None


def stop_running(signum: int = signal.SIGTERM) -> None:
    """Signal every process group that `repro` has started in this process (for signal handlers)."""
    _stopped.set()
    for group in tuple(_running):
        _signal(group, signum)


def require(layout: Layout, stage: str) -> None:
    """Check that the outputs which a stage reads are there.

    Raises:
        MissingInput: naming the first missing one and the command that makes it.
    """
    for name in UPSTREAM[stage]:
        if not (layout.stage(name) / "manifest.json").is_file():
            raise MissingInput(f"`{stage}` needs the output of `{name}`, which is missing", fix=f"regraft {name}")


def _run_group(
    layout: Layout, command: list[str], run: str, echo: Callable[[str], None] | None
) -> tuple[int, list[str]]:
    tail: deque[str] = deque(maxlen=40)
    process = subprocess.Popen(
        command,
        cwd=layout.root,
        env={**_environment(), "REGRAFT_RUN": run, "REGRAFT_CALLER": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process.pid)
    try:
        if _stopped.is_set():
            _signal(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            if echo is not None and not _is_noise(line):
                echo(line.rstrip("\n"))
        return process.wait(), list(tail)
    finally:
        if process.poll() is None or _group_alive(process.pid):  # an exception here: nothing is left running
            _signal(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _GRACE
            while _group_alive(process.pid) and time.monotonic() < deadline:
                process.poll()
                time.sleep(0.1)
            _signal(process.pid, signal.SIGKILL)
            process.wait()
        _running.discard(process.pid)
        if process.stdout is not None:
            process.stdout.close()


def _wait_for_orphan(layout: Layout, stage: str) -> None:
    """Let a stage whose starter was killed write its checkpoint and end; it has been told to by its own watch."""
    lock = layout.lock(stage)
    deadline = time.monotonic() + _GRACE
    while is_held(lock):
        holder = lock_holder(lock)
        caller = holder.get("caller")
        if isinstance(caller, int) and _alive(caller):
            raise Busy(
                f"the stage `{stage}` is busy: process {holder.get('pid')} runs it, started by process {caller}",
                fix="wait for it to end, then run the same command again",
            )
        if time.monotonic() > deadline:
            raise Busy(
                f"process {holder.get('pid')} still runs `{stage}`, although the process that started it is gone",
                fix=f"end process {holder.get('pid')}, then run the same command again",
            )
        time.sleep(0.2)


def _wait_for_release(layout: Layout, stage: str) -> None:
    """After DVC has ended, wait for the stage itself: a signal ends DVC first."""
    deadline = time.monotonic() + _GRACE
    while is_held(layout.lock(stage)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _outcome(layout: Layout, stage: str, run: str) -> dict[str, Any] | None:
    try:
        outcome = json.loads(layout.outcome(stage).read_bytes())
    except (OSError, ValueError):
        return None
    return outcome if isinstance(outcome, dict) and outcome.get("run") == run else None


def _failure(stage: str, code: int, outcome: dict[str, Any] | None, tail: list[str]) -> RegraftError:
    if outcome is not None and outcome.get("error"):
        error, own = outcome["error"], int(outcome["exit_code"])
        if own == Exit.PREEMPTED:
            return Preempted(error["message"], fix=error["fix"])
        if own == Exit.BUSY:
            return Busy(error["message"], fix=error["fix"])
        return StageFailed(error["message"], fix=error["fix"], stage=stage, code=own)
    if busy := next((line for line in tail if "is busy: process" in line), None):
        return Busy(busy, fix="wait for it to end, then run the same command again")
    if _stopped.is_set() or code in (-signal.SIGTERM, -signal.SIGINT):
        return Preempted(f"`{stage}` was stopped by a signal", fix="run the same command again")
    last = next((line for line in reversed(tail) if line.strip()), "no output")
    why = "killed, or DVC failed" if code >= 0 else f"ended by signal {-code}"
    return StageFailed(
        f"`{stage}` ended without an outcome ({why}): {last}",
        fix="run the same command again; if memory was short, `dmesg` says so",
        stage=stage,
    )


def _reasons(entry: Any) -> list[str]:
    """Turn an entry of `dvc status --json` into lines: `params.yaml train.learning_rate: modified`."""
    if isinstance(entry, str):
        return [entry]
    lines = []
    for kind, items in entry.items():
        what = "output " if kind == "changed outs" else ""
        for name, state in items.items() if isinstance(items, dict) else []:
            if isinstance(state, dict):
                lines += [f"{name} {key}: {value}" for key, value in state.items()]
            else:
                lines.append(f"{what}{name}: {state}")
    return lines


def _is_noise(line: str) -> bool:
    """Say whether DVC prints this line for people who work with it by hand."""
    noise = ("To track the changes", "git add", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")
    return not line.strip() or any(part in line for part in noise)


def _dvc() -> list[str]:
    return [sys.executable, "-m", "dvc"]


def _environment() -> dict[str, str]:
    """The environment of DVC and of stages: this interpreter first on PATH, nothing that calls home."""
    here = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }


def _signal(group: int, signum: int) -> None:
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return  # it has just ended


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
