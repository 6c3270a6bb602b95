import json
import math
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DamagedArtifact, MissingInput
from regraft.gates.data import judge_data
from regraft.gates.params import DataGate, SupervisionGate, TrainingGate
from regraft.gates.supervision import judge_supervision
from regraft.gates.training import judge_training, read_metrics
from regraft.gates.verdict import Verdict

D = {name: name[0] * 64 for name in ("adapter", "base", "tokenizer", "data", "holdout", "rows")}
LINES = [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0} for step in range(1, 11)]


def _failed(verdict: Verdict) -> list[str]:
    assert verdict.passed is not bool(verdict.reasons)
    return [each.name for each in verdict.checks if each.decisive and not each.passed]


def _data(reports: Any, *, rows: str = D["rows"], **changes: Any) -> Verdict:
    return judge_data(DataGate(), reports.validate(**changes), rows=rows, expected={"rows": D["rows"]})


def test_data_that_kept_its_contract_passes_and_warnings_are_only_reported(reports: Any) -> None:
    verdict = _data(reports, warned=["freshness"])
    assert verdict.passed
    assert [(each.name, each.passed) for each in verdict.checks if not each.decisive] == [("warnings", False)]
    assert verdict.judged == {"rows": D["rows"], "data": "d" * 64}


def test_data_that_broke_an_expectation_of_level_block_is_refused(reports: Any) -> None:
    verdict = _data(reports, blocked=["labels"])
    assert _failed(verdict) == ["contract"]
    assert verdict.reasons == ["Expectations of level block that failed: labels."]


def test_too_few_accepted_rows_are_refused(reports: Any) -> None:
    assert _failed(_data(reports, rows_out=99)) == ["rows"]
    assert _data(reports, rows_out=100).passed


def test_rows_that_are_not_the_prepared_ones_are_no_evidence(reports: Any) -> None:
    assert _failed(_data(reports, rows="x" * 64)) == ["evidence"]


def _supervision(reports: Any, *, expected: dict[str, str] | None = None, **changes: Any) -> Verdict:
    wanted = {name: D[name] for name in ("tokenizer", "data", "holdout")}
    return judge_supervision(SupervisionGate(), reports.preprocess(**changes), expected=expected or wanted)


def test_rows_that_all_train_and_learn_to_stop_pass(reports: Any) -> None:
    assert _supervision(reports).passed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rows", {"rows": 99}),
        ("trained_tokens", {"trained_tokens": 0}),
        ("training_nothing", {"rows_training_nothing": 1}),
        ("learning_to_stop", {"rows_learning_to_stop": 0.98}),
        ("learning_to_stop", {"rows_learning_to_stop": math.nan}),
        ("answers_recovered", {"answers_recovered": 0.9}),
        ("round_trip", {"round_trip": 0.9}),
        ("control_leaked", {"control_leaked": 1}),
        ("truncated", {"truncated": 1}),
        ("unknown_tokens", {"unknown_tokens": 20}),
        ("unknown_tokens", {"tokens": 0}),
    ],
)
def test_each_flaw_of_the_supervision_is_refused(reports: Any, name: str, changes: dict[str, Any]) -> None:
    assert _failed(_supervision(reports, **changes)) == [name]


@pytest.mark.parametrize("name", ["tokenizer", "data", "holdout"])
def test_a_preprocess_report_about_something_else_is_no_evidence(reports: Any, name: str) -> None:
    wanted = {key: D[key] for key in ("tokenizer", "data", "holdout")} | {name: "x" * 64}
    assert _failed(_supervision(reports, expected=wanted)) == ["evidence"]


def _training(
    reports: Any,
    *,
    metrics: list[dict[str, Any]] | None = None,
    adapter: str = D["adapter"],
    expected: dict[str, str] | None = None,
    **changes: Any,
) -> Verdict:
    wanted = {name: D[name] for name in ("adapter", "base", "tokenizer", "data")}
    return judge_training(
        TrainingGate(),
        reports.train(**changes),
        LINES if metrics is None else metrics,
        adapter=adapter,
        expected=expected or wanted,
    )


def test_a_run_that_learned_with_every_layer_passes(reports: Any) -> None:
    assert _training(reports).passed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("steps", {"steps": 9}),
        ("steps", {"steps": 0, "planned_steps": 0}),
        ("loss_drop", {"loss_last": 1.9}),
        ("loss_drop", {"loss_first": 0.0}),
        ("finite", {"all_finite": False}),
        ("finite", {"non_finite_steps": [4]}),
        ("finite", {"non_finite_parameters": ["a"]}),
        ("finite", {"grad_norm_largest": math.inf}),
        ("metrics", {"metrics": []}),
        ("finite", {"metrics": [*LINES, {"step": 11, "loss": math.nan, "grad_norm": 1.0}]}),
        ("finite", {"metrics": [*LINES, {"step": 11, "loss": 1.0, "grad_norm": math.inf}]}),
        ("finite", {"metrics": [*LINES, {"step": 11, "loss": 1.0}]}),
        ("missing_modules", {"missing_modules": ["layer.1"]}),
        ("missing_modules", {"expected_modules": ["layer.0", "layer.2"]}),
        ("zero_b", {"zero_b": ["layer.0"]}),
        ("zero_b", {"norms": {"layer.0": (1.0, 0.0)}}),
        ("zero_b", {"norms": {"layer.0": (-1.0, 1.0)}}),
    ],
)
def test_each_flaw_of_a_training_run_is_refused(reports: Any, name: str, changes: dict[str, Any]) -> None:
    assert _failed(_training(reports, **changes)) == [name]


def _preference(first: float | None, last: float | None) -> dict[str, Any]:
    own = {"objective": "kto", "beta": 0.1, "loss": "kto", "reference": "base"}
    return {**own, "margin_first": first, "margin_last": last, "accuracy_first": None, "accuracy_last": None}


@pytest.mark.parametrize(("first", "last", "passed"), [(0.0, 0.5, True), (0.0, 0.0, True), (0.5, 0.4, False)])
def test_preferred_answers_must_not_have_lost_on_the_others(
    reports: Any, first: float, last: float, passed: bool
) -> None:
    assert _failed(_training(reports, preference=_preference(first, last))) == ([] if passed else ["reward_margin"])


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [(None, 0.5, "the first tenth"), (0.0, None, "the last tenth"), (None, None, "the first and the last tenth")],
)
def test_a_margin_that_was_never_measured_is_a_no_that_names_what_to_do(
    reports: Any, first: float | None, last: float | None, said: str
) -> None:
    verdict = _training(reports, preference=_preference(first, last))

    assert _failed(verdict) == ["reward_margin"]
    assert f"not measured in {said}" in verdict.reasons[0]
    assert "train.batch_size" in verdict.reasons[0]
    assert "rarer kind" in verdict.reasons[0]


def test_a_mean_loss_that_is_not_finite_is_no_drop_either(reports: Any) -> None:
    for loss in (math.nan, math.inf, -math.inf):
        assert _failed(_training(reports, loss_last=loss)) == ["finite", "loss_drop"]


def test_a_run_without_any_adapter_is_refused(reports: Any) -> None:
    assert _failed(_training(reports, norms={}, expected_modules=[])) == ["modules"]


@pytest.mark.parametrize("name", ["adapter", "base", "tokenizer", "data"])
def test_a_training_report_about_something_else_is_no_evidence(reports: Any, name: str) -> None:
    wanted = {key: D[key] for key in ("adapter", "base", "tokenizer", "data")} | {name: "x" * 64}
    assert _failed(_training(reports, expected=wanted)) == ["evidence"]


def test_an_adapter_whose_files_are_not_those_that_were_trained_is_no_evidence(reports: Any) -> None:
    verdict = _training(reports, adapter="x" * 64)
    assert _failed(verdict) == ["evidence"]
    assert "the adapter's folder" in verdict.reasons[0]


def test_metrics_are_read_raw_and_anything_else_than_json_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(MissingInput):
        read_metrics(path)
    path.write_text('{"loss": NaN}\n' + json.dumps(LINES[0]) + "\n")
    first, second = read_metrics(path)
    assert math.isnan(first["loss"])
    assert second == LINES[0]
    for wrong in ("{", "[1]", '"x"'):
        path.write_text(wrong)
        with pytest.raises(DamagedArtifact, match="is not JSON lines"):
            read_metrics(path)
