"""Looking at the plan before training takes a device, and keeping what was used afterwards.

`regraft.train` loads this module by name: it decides whether a training starts, never what it makes, so a change here
must not retrain anything and it is not among the stage's deps.
"""

import json
import logging
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import write_json
from regraft.errors import RegraftError
from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.plan.cards import Card
from regraft.plan.compare import mib
from regraft.plan.fit import Fit, expected_bytes, fit, settings_of
from regraft.plan.memory import Prediction, predict
from regraft.plan.observations import Correction, correction, record
from regraft.plan.setup import Setup, setup_from
from regraft.plan.source import made_blocks, shapes_of
from regraft.train.params import TrainParams

log = logging.getLogger("regraft.plan")


@dataclass(frozen=True)
class Expected:
    """What was expected before a training, to be compared with what it used."""

    device: str
    setup: Setup
    prediction: Prediction
    total: int
    """Bytes, corrected."""
    started: int
    """Bytes that the process held before; on a GPU none."""


def observations_file(layout: Layout) -> Path:
    """Where the clone keeps what trainings used."""
    return layout.measurements("plan")


def before(train: TrainParams, model: ModelParams, layout: Layout) -> Expected | None:
    """Check that a training fits the device that it is about to take.

    Returns:
        What is expected; None for a model that the plan does not know, which is trained without one.

    Raises:
        RegraftError: it does not fit; the message says what was expected, part by part, and which setting would fit.
    """
    made = made_blocks(layout)
    if made is None:
        return None  # training says itself that its input is missing
    try:
        architecture = shapes_of(model, layout)
    except RegraftError as error:
        log.info("trained without a plan: %s", error.message)
        return None
    device, free, on_gpu = _device()
    bf16 = Card(device, free).bf16
    setup = setup_from(train, model, length=made[0], trained=made[1], on_gpu=on_gpu, bf16=bf16)
    prediction = predict(architecture, setup)
    learnt = correction(observations_file(layout), device, bits=setup.bits)
    total = expected_bytes(prediction, learnt)
    log.info("plan: %s MiB expected of %s MiB free on %s", mib(total), mib(free), device)
    if total > free:
        found = fit(architecture, setup, free, learnt)
        raise RegraftError(_does_not_fit(prediction, total, free, device, learnt), fix=_fix(setup, train, found))
    return Expected(device, setup, prediction, total, 0 if on_gpu else _resident())


def after(expected: Expected | None, layout: Layout) -> None:
    """Keep predicted against used, in the stage's measurements and for the next plan; nothing where nothing was trained."""
    if expected is None:
        return
    measurements = layout.measurements("train")
    try:
        found: dict[str, Any] = json.loads(measurements.read_bytes())
    except (OSError, ValueError):
        return
    used = _used(expected) if found.get("steps") else 0
    if used <= 0:
        return
    plan = {"device": expected.device, "predicted_mb": round(expected.total / 2**20, 1)}
    plan |= {"used_mb": round(used / 2**20, 1), "used_over_predicted": round(used / expected.total, 3)}
    write_json(measurements, {**found, "plan": plan})
    record(observations_file(layout), expected.device, expected.setup, expected.prediction, used)
    log.info("plan: used %s MiB of the %s MiB expected", mib(used), mib(expected.total))


def _device() -> tuple[str, int, bool]:
    """Return the device's name, its free bytes, and whether it is a GPU."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.get_device_name(), int(free), True
    import psutil

    return "cpu", int(psutil.virtual_memory().available), False


def _used(expected: Expected) -> int:
    """Bytes of the device at the peak: what torch reserved and the context, or what the process grew by on a CPU."""
    if expected.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return int(peak) - expected.started
    import torch

    free, total = torch.cuda.mem_get_info()
    context = max(0, total - free - torch.cuda.memory_reserved())
    return int(torch.cuda.max_memory_reserved()) + min(context, expected.prediction.context * 3)


def _resident() -> int:
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def _does_not_fit(prediction: Prediction, total: int, free: int, device: str, learnt: Correction | None) -> str:
    parts = ", ".join(f"{name} {mib(size)}" for name, size in prediction.to_dict().items() if name in prediction.PARTS)
    known = f" (corrected by {learnt.observations} measurements on it)" if learnt is not None else ""
    return (
        f"this training is expected to take {mib(total)} MiB{known}, and {device} has {mib(free)} MiB free; "
        f"it was not started. In MiB: {parts}"
    )


def _fix(setup: Setup, train: TrainParams, found: Fit) -> str:
    if not found.fits:
        return (
            f"no configuration of the plan fits ({mib(found.total)} MiB at the least): take a larger card or a smaller "
            "base, or free the card's memory"
        )
    changed = settings_of(setup, found.setup, alpha=train.alpha, max_length=setup.length)
    values = ", ".join(f"{key} to {value}" for key, value in changed.items())
    return f"set {values} ({mib(found.total)} MiB); `regraft plan --apply` writes it"
