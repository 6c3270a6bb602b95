"""Several processes that train together, one for each GPU (or on a CPU): data parallel, through torchrun and accelerate.

Each process holds the whole base and adapter and takes its share of a step's blocks; gradients are averaged so that a
step is the one that a single process would make of all blocks. The first process alone writes checkpoints and output.
With `sharding: full` each holds a part of the base only (`regraft.train.shard`).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from regraft.errors import Busy, Exit, Preempted, RegraftError, StageFailed, TrainingDiverged

if TYPE_CHECKING:
    from types import FrameType

    import torch

_RESULT, _STAGE = "REGRAFT_MEMBER_RESULT", "REGRAFT_MEMBER_OF"


def size() -> int:
    """Number of processes that train together; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_member() else 1


def is_member() -> bool:
    """Say whether this process was started by torchrun for a stage."""
    return _STAGE in os.environ and "RANK" in os.environ


def is_first() -> bool:
    """Say whether this process is the one that writes."""
    return not is_member() or os.environ["RANK"] == "0"


def join() -> None:
    """Meet the other processes, each on its own GPU; alone, nothing happens."""
    if size() == 1:
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other processes."""
    if size() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def told_by_first(value: Any) -> Any:
    """Return the first process's value in all of them."""
    if size() == 1:
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """Return every process's value, in their order, in all of them."""
    if size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def summed(values: "torch.Tensor") -> "torch.Tensor":
    """Return the sum over all processes."""
    if size() > 1:
        from torch import distributed

        distributed.all_reduce(values)
    return values


def train_together(module: str, processes: int) -> None:
    """Run `python -m MODULE` in so many processes under torchrun, and wait; a SIGTERM or SIGINT is passed on.

    Raises:
        RegraftError: as the first process ended; `Preempted` where a signal stopped it after its checkpoint.
    """
    with TemporaryDirectory(prefix="regraft-crew-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, _RESULT: str(result), _STAGE: str(os.getpid())}
        environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
        running = subprocess.Popen([*command, "-m", module], env=environment, start_new_session=True)
        requested: list[str] = []

        def pass_on(number: int, frame: "FrameType | None") -> None:
            requested.append(signal.Signals(number).name)
            running.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = running.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if running.poll() is None:
                running.terminate()
                running.wait()
        ended: dict[str, Any] = json.loads(result.read_bytes()) if result.exists() else {}
        if ended.get("error"):
            raise _error(ended)
        if requested and not ended:
            raise Preempted(f"stopped by {requested[0]} before a checkpoint", fix="run the same command again")
        if code or not ended:
            raise RegraftError(
                f"{processes} processes that train together ended with code {code}, and the first said nothing",
                fix="read what they printed; `train.processes: 1` trains alone",
            )


def run_member(body: Callable[[], object]) -> int:
    """Run one process's part and return its exit code; the first one leaves word of how it ended."""
    from regraft.stage import follow_starter

    ended: dict[str, Any] = {"error": None}
    try:
        follow_starter(int(os.environ[_STAGE]))
        body()
    except RegraftError as error:
        kind = type(error).__name__
        ended = {"error": kind, "message": error.message, "fix": error.fix, "exit_code": int(error.exit_code)}
    if is_first() or ended["error"]:
        _leave_word(ended)
    return int(ended.get("exit_code", Exit.DONE))


def _leave_word(ended: dict[str, Any]) -> None:
    """The first error counts: the others fail because of it."""
    path = Path(os.environ[_RESULT])
    if not path.exists():
        path.write_text(json.dumps(ended), encoding="utf-8")


def _error(ended: dict[str, Any]) -> RegraftError:
    kinds: tuple[type[RegraftError], ...] = (Preempted, Busy, TrainingDiverged)
    kind = next((each for each in kinds if each.__name__ == ended["error"]), None)
    if kind is not None:
        return kind(ended["message"], fix=ended["fix"])
    return StageFailed(ended["message"], fix=ended["fix"], stage="train", code=ended["exit_code"])
