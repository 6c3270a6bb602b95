"""What trainings used corrects the next plan for the same hardware, and only that."""

from pathlib import Path

import pytest

from regraft.plan.architecture import architecture
from regraft.plan.memory import predict
from regraft.plan.observations import KEPT, Correction, correction, record
from regraft.plan.setup import Setup

GPT2 = architecture({"model_type": "gpt2"})
SETUP = Setup(batch=2)
PREDICTED = predict(GPT2, SETUP)
KNOWN = PREDICTED.base + PREDICTED.unquantized + PREDICTED.adapter + PREDICTED.gradients + PREDICTED.optimizer


def used(ratio: float) -> int:
    """Bytes where all that is not exactly known takes `ratio` of what was predicted."""
    return KNOWN + int((PREDICTED.total - KNOWN) * ratio)


def test_without_observations_there_is_no_correction(tmp_path: Path) -> None:
    assert correction(tmp_path / "plan.json", "card") is None


def test_the_next_plan_on_that_hardware_is_what_was_used_and_weights_are_not_scaled(tmp_path: Path) -> None:
    file = tmp_path / "deep/plan.json"
    record(file, "card", SETUP, PREDICTED, used(1.25))
    learnt = correction(file, "card")
    assert learnt is not None
    assert learnt.ratio == pytest.approx(1.25, abs=1e-6)
    assert learnt.applied(PREDICTED) == pytest.approx(used(1.25), abs=2)
    larger = predict(GPT2, SETUP.but(batch=4))
    assert learnt.applied(larger) == KNOWN + int((larger.total - KNOWN) * learnt.ratio)
    assert correction(file, "another card") is None


def test_the_median_of_the_newest_counts_so_one_odd_run_does_not(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for ratio in [1.9] * 5 + [1.1] * 7 + [0.6]:
        record(file, "card", SETUP, PREDICTED, used(ratio))
    learnt = correction(file, "card")
    assert learnt is not None
    assert learnt.ratio == pytest.approx(1.1, abs=1e-6)
    assert learnt.observations == 8


def test_runs_with_as_many_bits_are_preferred(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    record(file, "card", SETUP, PREDICTED, used(1.1))
    record(file, "card", SETUP.but(bits=16), PREDICTED, used(0.9))
    for bits, ratio in ((4, 1.1), (16, 0.9), (8, 1.0)):
        learnt = correction(file, "card", bits=bits)
        assert learnt is not None
        assert learnt.ratio == pytest.approx(ratio, abs=1e-6)


def test_an_absurd_measurement_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    record(file, "card", SETUP, PREDICTED, 100 * PREDICTED.total)
    assert correction(file, "card") == Correction("card", 2.0, 1)


def test_the_oldest_are_dropped_and_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    import json

    file = tmp_path / "plan.json"
    file.write_text("[broken")
    assert correction(file, "card") is None
    for _ in range(KEPT + 3):
        record(file, "card", SETUP, PREDICTED, PREDICTED.total)
    assert len(json.loads(file.read_text())["observations"]) == KEPT
