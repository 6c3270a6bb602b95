"""The plan before and after a training: refused where it can't fit, and what was used is kept."""

import json
import logging
from pathlib import Path

import pytest

from regraft.artifacts import write_json
from regraft.errors import RegraftError
from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.plan import check
from regraft.train.params import TrainParams

MIB = 2**20
TRAIN = TrainParams(max_steps=1, batch_size=16, optimizer="adamw_torch_fused")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A clone in which `preprocess` has run."""
    report = {"longest_block": 128, "block_length": 128, "supervision": {"tokens": 1000, "trained_tokens": 250}}
    write_json(tmp_path / "data/work/preprocess/report.json", report)
    return Layout(tmp_path)


def device(monkeypatch: pytest.MonkeyPatch, name: str, free: int) -> None:
    monkeypatch.setattr(check, "_device", lambda: (name, free, name != "cpu"))


def test_a_training_that_fits_may_start(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "card", 8 * 1024 * MIB)
    expected = check.before(TRAIN, ModelParams(), layout)
    assert expected is not None
    assert (expected.setup.length, expected.setup.trained, expected.device) == (128, 0.25, "card")
    assert expected.total == expected.prediction.total


def test_one_that_does_not_fit_is_refused_with_its_parts_and_what_would_fit(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(monkeypatch, "card", 547 * MIB)
    with pytest.raises(RegraftError) as caught:
        check.before(TRAIN, ModelParams(), layout)
    assert "MiB free; it was not started. In MiB: base 0, unquantized 0, " in caught.value.message
    assert "card has 547 MiB free" in caught.value.message
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("no configuration of the plan fits")
    device(monkeypatch, "card", 562 * MIB)
    with pytest.raises(RegraftError) as caught:
        check.before(TRAIN, ModelParams(), layout)
    assert caught.value.fix is not None
    assert "train.batch_size to " in caught.value.fix
    assert "`regraft plan --apply` writes it" in caught.value.fix


def test_a_model_that_the_plan_does_not_know_is_trained_without_one(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device(monkeypatch, "card", MIB)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "mamba"}')
    with caplog.at_level(logging.INFO):
        assert check.before(TRAIN, ModelParams(base=str(tmp_path / "base")), layout) is None
    assert "trained without a plan: no plan for the model type 'mamba'" in caplog.text
    check.after(None, layout)
    assert not (tmp_path / "data/work/measurements").exists()


def test_before_preprocessing_there_is_nothing_to_plan(tmp_path: Path) -> None:
    assert check.before(TRAIN, ModelParams(), Layout(tmp_path)) is None


def test_what_was_used_is_kept_and_corrects_the_next_plan(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "card", 8 * 1024 * MIB)
    expected = check.before(TRAIN, ModelParams(), layout)
    assert expected is not None
    monkeypatch.setattr(check, "_used", lambda *_: int(expected.total * 1.2))
    write_json(layout.measurements("train"), {"steps": 5, "seconds": 1.0})
    check.after(expected, layout)
    measured = json.loads(layout.measurements("train").read_text())
    assert measured["seconds"] == 1.0
    assert measured["plan"]["used_over_predicted"] == 1.2
    again = check.before(TRAIN, ModelParams(), layout)
    assert again is not None
    assert again.total == pytest.approx(expected.total * 1.2, rel=1e-3)


def test_a_run_that_did_no_step_teaches_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "card", 8 * 1024 * MIB)
    expected = check.before(TRAIN, ModelParams(), layout)
    write_json(layout.measurements("train"), {"steps": 0})
    check.after(expected, layout)
    assert not check.observations_file(layout).exists()


def test_on_a_cpu_the_process_itself_is_measured(layout: Layout) -> None:
    expected = check.before(TRAIN, ModelParams(), layout)
    assert expected is not None
    assert expected.device == "cpu"
    assert expected.setup.compute_bytes == 4
    held = bytearray(300 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    write_json(layout.measurements("train"), {"steps": 1})
    check.after(expected, layout)
    (seen,) = json.loads(check.observations_file(layout).read_text())["observations"]
    assert seen["used"] > 250 * MIB
