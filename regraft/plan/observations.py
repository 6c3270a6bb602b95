"""What trainings really used, by hardware, so that the next plan for that hardware is nearer.

    data/work/measurements/plan.json    {"schema_version": 1, "observations": [{"device", "setup", "predicted", "used"}]}

Measurements, never an output: nothing that a stage makes depends on them. Weights, adapter and optimizer are known to
the byte; what is corrected is the rest (activations, logits, workspace, context, and the allocator's waste).
"""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json, write_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.plan.memory import Prediction
from regraft.plan.setup import Setup

KEPT = 64
"""Newest observations that are kept."""
_COUNTED, _LEAST, _MOST = 8, 0.5, 2.0


@dataclass(frozen=True)
class Correction:
    """The rest of a step's memory, used over predicted, on one kind of hardware."""

    device: str
    ratio: float
    observations: int

    def applied(self, prediction: Prediction) -> int:
        """Return the corrected total in bytes."""
        known = _known(prediction.to_dict())
        return known + int((prediction.total - known) * self.ratio)


def record(file: Path, device: str, setup: Setup, prediction: Prediction, used: int) -> None:
    """Add one observation; the oldest beyond `KEPT` are dropped.

    Args:
        file: see above; made where it is missing, made anew where it is unreadable.
        device: the hardware as its driver names it.
        setup: what was trained.
        prediction: what was predicted, uncorrected.
        used: bytes on the device at the peak, context included.
    """
    entry = {
        "device": device,
        "setup": dataclasses.asdict(setup),
        "predicted": prediction.to_dict(),
        "used": used,
        "ratio": round(used / prediction.total, 4),
    }
    write_json(file, {"schema_version": 1, "observations": [*_read(file), entry][-KEPT:]})


def correction(file: Path, device: str, *, bits: int | None = None) -> Correction | None:
    """Return what was learnt on a device: the median over its newest observations; None where there is none.

    Args:
        file: see above.
        device: the hardware.
        bits: where the device has observations with that many bits, only those count.
    """
    own = [each for each in _read(file) if each["device"] == device]
    alike = [each for each in own if each["setup"]["bits"] == bits] or own
    ratios = []
    for each in alike[-_COUNTED:]:
        known = _known(each["predicted"])
        ratios.append((each["used"] - known) / (each["predicted"]["total"] - known))
    if not ratios:
        return None
    return Correction(device, min(_MOST, max(_LEAST, statistics.median(ratios))), len(ratios))


def _known(predicted: dict[str, int]) -> int:
    return sum(predicted[part] for part in ("base", "unquantized", "adapter", "gradients", "optimizer"))


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = read_json(file)["observations"]
        return [e for e in found if e["used"] > 0 and e["predicted"]["total"] > _known(e["predicted"]) and e["setup"]]
    except (MissingInput, DamagedArtifact, KeyError, TypeError):
        return []
