"""MLflow runs and live metrics: the file of record first, the server when it answers.

    with MetricsTail(settings.register, layout) as tail:     # around the stage `train`
        repro(layout, "train")
    tail.run_id, tail.unsent

The trainer appends `metrics.jsonl` and knows nothing of MLflow. A thread of its *caller* reads that file and sends
what is new; a server that refuses or hangs costs that thread its time and nobody else. What was not sent is sent at
the end (20 s at most), by the next tail, or by `register`. A step is logged once: before anything is sent over a new
or broken connection, the server is asked which steps it has. `speed.jsonl` beside that file (tokens and operations a second,
share of the GPU's peak, memory) is followed likewise, its metrics under `speed/`.

Covered: outages, answers lost after the server had committed, kill -9 of either process, a resume that rewinds the
file. Not covered: two tails that follow one training at once (they are callers, and callers hold its lock).
"""

import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regraft.artifacts import read_json, write_json
from regraft.errors import Preempted, RegraftError
from regraft.failpoints import failpoint
from regraft.layout import Layout
from regraft.register.params import RegisterParams
from regraft.register.service import Answer, Service

log = logging.getLogger("regraft.tracking")

TAG = "regraft.training"
"""Tag of the run that follows a training; its value is the training's key."""
SPEED = "speed/"
"""What the names of metrics begin with that say how fast training went and what it took."""
POLL = 2.0
"""Seconds between looks at the file; a person who watches a curve needs no more."""
LAST_WORD = 20.0
"""Seconds that the end of training waits for what is not sent yet."""
_BATCH = 900  # metrics in one call; MLflow takes 1,000
_CALL = 5  # seconds for one call: live metrics can wait for a later look
_BACKOFF = (2.0, 4.0, 8.0, 16.0, 30.0)  # seconds without a further attempt after a failure; then the last again


@dataclass
class Curve:
    """Reads a `metrics.jsonl` that grows, and is cut when training resumes; each complete line is one step."""

    path: Path
    prefix: str = ""
    """What the names of its metrics begin with."""
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    _offset: int = 0
    _last: bytes = b""

    def read(self) -> None:
        """Take in what is new. A file that was cut, and grew again, is read from its start."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._offset, self._last, self.steps = 0, b"", {}
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._take(line)
        if whole:
            self._offset += len(whole)
            self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            self.steps[step] = {self.prefix + name: float(v) for name, v in values.items() if _is_number(v)}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s: a line is not a step and is passed over: %s", self.path, error)


class MetricsTail:
    """Follows the training that `data/work/checkpoints/current.json` names into MLflow; see the module."""

    def __init__(
        self, params: RegisterParams, layout: Layout, *, poll: float = POLL, last_word: float = LAST_WORD
    ) -> None:
        self.run_id: str | None = None
        """The MLflow run, as soon as there is one."""
        self._params = params
        self._layout = layout
        self._poll = poll
        self._last_word = last_word
        self._ended = threading.Event()
        self._status = "FINISHED"
        self._thread: threading.Thread | None = None
        self._sender: _Sender | None = None

    @property
    def unsent(self) -> int:
        """Steps in the file that the server is not known to have."""
        return 0 if self._sender is None else len(self._sender.pending())

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._follow, daemon=True, name="metrics-tail")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, Preempted | KeyboardInterrupt)
        self._status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._last_word)
        if self.unsent:
            log.warning("%d steps are not in MLflow yet; they are sent when it answers again", self.unsent)

    def _follow(self) -> None:
        failures, earliest = 0, 0.0
        while True:
            ended = self._ended.is_set()
            try:
                self._look()
                if self._sender is not None and (ended or time.monotonic() >= earliest):
                    self._sender.send(self._status if ended else None)
                    self.run_id, failures = self._sender.run_id, 0
            except Exception as error:  # noqa: BLE001 - the thread's boundary: whatever it is, training goes on
                log.debug("live metrics: %s: %s", type(error).__name__, error)
                earliest = time.monotonic() + _BACKOFF[min(failures, len(_BACKOFF) - 1)]
                failures += 1
            if ended:
                return
            self._ended.wait(self._poll)

    def _look(self) -> None:
        """Read what is new, of the training that is current now."""
        key = current_key(self._layout)
        if key is None:
            return
        if self._sender is None or self._sender.key != key:
            before, self._sender = self._sender, _Sender(self._params, self._layout, key)
            if before is not None:
                before.send("KILLED")  # it was left for a training from other inputs
        self._sender.read()


@dataclass
class _Stream:
    """One file of a training, and which of its steps the server has."""

    curve: Curve
    always: str
    """A metric that every step of it has."""
    sent: set[int] = field(default_factory=set)
    last: int = -1
    """Every step up to this one was acknowledged once; a hint that spares asking."""

    def pending(self) -> list[int]:
        """Steps that were read and not acknowledged, in order."""
        return sorted(step for step in list(self.curve.steps) if step > self.last and step not in self.sent)


class _Sender:
    """Sends one training's steps; notes the last step that was acknowledged beside the other work files."""

    def __init__(self, params: RegisterParams, layout: Layout, key: str) -> None:
        self.key = key
        self.run_id: str | None = None
        self._file = live_metrics(layout, key)
        speed = self._file.with_name("speed.jsonl")
        self._streams = {
            "last": _Stream(Curve(self._file), "loss"),
            "last_speed": _Stream(Curve(speed, SPEED), f"{SPEED}tokens_per_second"),
        }
        self._params = params
        self._note = layout.work / "tracking" / f"{key[:16]}.json"
        self._service = Service.of(params, layout)
        self._service.timeout, self._service.patience = _CALL, LAST_WORD
        self._status: str | None = None
        self._sure = False
        try:
            note = read_json(self._note)
            if note["key"] == key:
                self.run_id, self._status = note["run_id"], note["status"]
                for name, stream in self._streams.items():
                    stream.last = int(note.get(name, -1))
        except (RegraftError, KeyError, TypeError, ValueError):
            log.debug("%s: nothing sent so far", key[:16])

    def read(self) -> None:
        """Take in what is new in the training's files."""
        for stream in self._streams.values():
            stream.curve.read()

    def pending(self) -> set[int]:
        """Steps that were read and not acknowledged."""
        return {step for stream in self._streams.values() for step in stream.pending()}

    def send(self, status: str | None) -> None:
        """Send what is pending, then the run's end if it has ended. Nothing to send asks nobody and imports nothing."""
        if self._file.with_name("finished.json").exists():
            status = "FINISHED"
        if not self.pending() and (status is None or status == self._status or self.run_id is None):
            return
        self._service.restart_clock()
        try:
            self._send(self._service, status)
        except RegraftError:
            self._sure = False  # the server may have committed what it did not answer
            raise

    def _send(self, service: Service, status: str | None) -> None:
        if not self._sure:
            self.run_id, self._status = training_run(service, self._params, self.key)
            for stream in self._streams.values():
                stream.sent, stream.last = logged_steps(service, self.run_id, stream.always), -1
            self._sure = True
        assert self.run_id is not None
        if self.pending() and self._status != "RUNNING":
            service.ask("update_run", self.run_id, status="RUNNING")
            self._status = "RUNNING"
        for stream in self._streams.values():
            steps = {step: stream.curve.steps[step] for step in stream.pending()}
            log_steps(service, self.run_id, steps, stream.sent)
        if status is not None and status != self._status:
            service.ask("set_terminated", self.run_id, status)
            self._status = status
        last = {name: max(stream.sent, default=-1) for name, stream in self._streams.items()}
        write_json(self._note, {"key": self.key, "run_id": self.run_id, "status": self._status, **last})


def current_key(layout: Layout) -> str | None:
    """Return the key of the training that started last, None before the first."""
    try:
        key = read_json(layout.checkpoints / "current.json")["key"]
    except (RegraftError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) and key.isalnum() else None


def live_metrics(layout: Layout, key: str) -> Path:
    """Return the metrics file of a training under way."""
    return layout.checkpoints / key[:16] / "metrics.jsonl"


def training_key(layout: Layout) -> str | None:
    """Return the key of the training that made `data/work/train`, None if it was made elsewhere or earlier."""
    key = current_key(layout)
    if key is None:
        return None
    try:
        same = live_metrics(layout, key).read_bytes() == (layout.stage("train") / "metrics.jsonl").read_bytes()
    except OSError:
        return None
    return key if same else None


def training_run(service: Service, params: RegisterParams, key: str) -> tuple[str, str]:
    """Return id and status of the run that follows a training; it is made where there is none."""
    experiment = service.experiment(params.experiment)
    run = service.find_run(experiment, {TAG: key})
    if run is None:
        failpoint("tracking.run")
        run = service.ask("create_run", experiment, tags={"mlflow.runName": f"train {key[:8]}", TAG: key})
    return str(run.info.run_id), str(run.info.status)


def logged_steps(service: Service, run_id: str, metric: str = "loss") -> set[int]:
    """Return the steps for which a run has a metric; a step's values are sent in one call, so it has all of them."""
    try:
        return {int(each.step) for each in service.ask("get_metric_history", run_id, metric)}
    except Answer as answer:
        if answer.code == "RESOURCE_DOES_NOT_EXIST":
            return set()
        raise


def log_steps(service: Service, run_id: str, steps: dict[int, dict[str, float]], sent: set[int]) -> None:
    """Send steps in batches, in order; each is added to `sent` when the server has it."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    batch: list[Any] = []
    numbers: list[int] = []
    for step, values in sorted(steps.items()):
        batch += [Metric(name, value, now, step) for name, value in values.items()]
        numbers.append(step)
        if len(batch) >= _BATCH or step == max(steps):
            failpoint("tracking.batch")
            service.ask("log_batch", run_id, metrics=batch)
            sent.update(numbers)
            batch, numbers = [], []


def replay(service: Service, run_id: str, path: Path) -> int:
    """Send a training's steps that its run lacks; return how many."""
    curve = Curve(path)
    curve.read()
    sent = logged_steps(service, run_id)
    missing = {step: values for step, values in curve.steps.items() if step not in sent}
    log_steps(service, run_id, missing, sent)
    return len(missing)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
