"""What training needs of the machine: the same arithmetic at every run, plain words when memory or disk end, speed."""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import RegraftError
from regraft.model.load import device
from regraft.model.params import ModelParams
from regraft.train.params import TrainParams
from regraft.train.speed import Speed, rates

if TYPE_CHECKING:
    import torch


@contextmanager
def reproducible(params: TrainParams) -> Iterator[None]:
    """Fix what else would vary between runs, and put it back."""
    import torch
    from torch.utils import deterministic

    threads = torch.get_num_threads()
    strict, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)  # some GPU kernels have no deterministic variant
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs in kernels, costs time
    if params.threads is not None:
        torch.set_num_threads(params.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=only_warn)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def explained(params: TrainParams, model: ModelParams) -> Iterator[None]:
    """Turn an exhausted machine into an error that names the setting to change."""
    try:
        yield
    except RegraftError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RegraftError(
            f"the disk is full ({error.filename or 'while training'}); finished checkpoints are as they were",
            fix="free some space, or lower train.keep_checkpoints, then run the same command again: it resumes",
        ) from error
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not (isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text):
            raise
        smaller = [
            f"train.batch_size to {max(1, params.batch_size // 2)} and train.accumulation to {params.accumulation * 2}"
            if params.batch_size > 1
            else "",
            "" if params.gradient_checkpointing else "train.gradient_checkpointing to true",
            "model.quantization.bits to 4" if model.quantization.bits > 4 else "",
            f"train.rank to {params.rank // 2}" if params.rank > 8 else "",
        ]
        raise RegraftError(
            f"out of memory on the {device().type} with batch_size {params.batch_size}, rank {params.rank} and "
            f"{model.quantization.bits}-bit weights: {text.splitlines()[0] if text else type(error).__name__}",
            fix=f"set {', or '.join(s for s in smaller if s) or 'a smaller preprocess.block_length'} in params.yaml",
        ) from error


def spare_walks(model: Any, parameters: "Mapping[str, torch.nn.Parameter]") -> None:
    """Keep the Trainer from walking through all modules to say what they know, and to look for gradients.

    A model of 32 layers with its adapter has 2,700 modules: 12 ms of Python in each step, while a GPU waits.

    Args:
        model: is put into training mode.
        parameters: all that is trained; the same dict is read at each step.
    """
    model.train()

    def train(mode: bool = True) -> Any:
        return model if mode is model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        assert set_to_none
        for parameter in parameters.values():
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad


def measured(
    new: Mapping[str, int], started: float, begun: float, trained: float, resumed: Path | None, speed: Speed
) -> dict[str, Any]:
    """Return how fast this process trained and what it took; never an input of anything.

    Tokens a second count padding, useful ones don't; both are of the steps that this process did. Memory in MiB.
    """
    import torch

    seconds = trained - begun
    on_gpu = torch.cuda.is_available()
    return {
        "seconds": round(time.monotonic() - started, 3),
        "training_seconds": round(seconds, 3),
        "training_cpu_seconds": round(time.process_time() - speed.cpu_began, 3),
        "steps": new["steps"],
        "resumed_from": resumed.name if resumed else None,
        **rates(new["computed"], new["seen"], seconds, speed),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }
