"""Did the training run do what it should: all finite, the loss went down, every expected layer carries an adapter."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.errors import DamagedArtifact, MissingInput
from regraft.gates.params import TrainingGate
from regraft.gates.verdict import Check, Verdict, at_least, decide, none_of, same
from regraft.train.report import PreferenceResult, TrainReport

GATE = "training"
_RAW = ("loss", "grad_norm")


def judge_training(
    params: TrainingGate,
    report: TrainReport,
    metrics: Sequence[Mapping[str, Any]],
    *,
    adapter: str,
    expected: Mapping[str, str],
) -> Verdict:
    """Judge a training run.

    Args:
        params: how far the loss must have gone down.
        report: of the stage `train`.
        metrics: the lines of its `metrics.jsonl`, raw.
        adapter: digest of the adapter's files, as they lie there.
        expected: digests that the report must name: `adapter` that is judged, `base`, `tokenizer`, and `data` that was
            prepared.
    """
    found = {
        "adapter": report.adapter_digest,
        "base": report.base_digest,
        "tokenizer": report.tokenizer_digest,
        "data": report.dataset_digest,
    }
    adapted = {module.name for module in report.adapted_modules}
    broken = [module.name for module in report.adapted_modules if not _is_positive(module.a_norm, module.b_norm)]
    drop = (report.loss_first - report.loss_last) / report.loss_first if report.loss_first > 0 else math.nan
    checks = [
        *same(expected, found, "the training report"),
        *same({"adapter": report.adapter_digest}, {"adapter": adapter}, "the adapter's folder"),
        at_least("steps", report.steps, max(1, report.planned_steps), "Optimizer steps"),
        at_least("metrics", len(metrics), 1, "Lines of raw metrics"),
        none_of("finite", _not_finite(report, metrics), "Values that are not finite"),
        at_least("loss_drop", drop, params.min_loss_drop, "Share by which the loss went down"),
        at_least("modules", len(adapted), 1, "Layers with an adapter"),
        none_of(
            "missing_modules",
            sorted({*report.missing_modules, *(set(report.expected_modules) - adapted)}),
            "Expected layers without an adapter",
        ),
        none_of("zero_b", sorted({*report.zero_b, *broken}), "Adapted layers that change nothing"),
    ]
    if (preference := report.preference) is not None:
        checks.append(_rise(preference))
    return decide(GATE, checks, expected)


def _rise(preference: PreferenceResult) -> Check:
    """Ask that preferred answers gained on the others; where either end of the run measured nothing, it is a no."""
    name, what = "reward_margin", "Rise of the reward of preferred answers over the others"
    first, last = preference.margin_first, preference.margin_last
    if first is not None and last is not None:
        return at_least(name, last - first, 0, what)
    ends = [end for end, margin in (("first", first), ("last", last)) if margin is None]
    return Check(
        name=name,
        passed=False,
        detail=f"{what}: not measured in the {' and the '.join(ends)} tenth of the steps, where no batch had answers of both "
        "kinds, but at least 0 is asked for; raise train.batch_size, or label more answers of the rarer kind.",
        threshold=0,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; NaN and infinities are let through, for the gate to find.

    Raises:
        MissingInput: it is not there.
        DamagedArtifact: a line is not a JSON object.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing", fix="regraft train") from error
    except ValueError as error:
        raise DamagedArtifact(f"{path} is not JSON lines: {error}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise DamagedArtifact(f"{path} is not JSON lines of objects")
    return lines


def _not_finite(report: TrainReport, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [f"{key} at step {line.get('step')}" for line in metrics for key in _RAW if not _is_finite(line.get(key))]
    found += [f"loss or gradient at step {step}" for step in report.non_finite_steps]
    found += report.non_finite_parameters
    if not all(map(math.isfinite, (report.loss_first, report.loss_last, report.grad_norm_largest))):
        found.append("the report's mean losses or largest gradient")
    return found or ([] if report.all_finite else ["the report says so, and not where"])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(*norms: float) -> bool:
    return all(math.isfinite(norm) and norm > 0 for norm in norms)
