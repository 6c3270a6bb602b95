import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import verify_dir, write_json
from regraft.errors import MissingInput, StageFailed
from regraft.evaluate.answers import read_answers
from regraft.evaluate.evaluate import evaluate
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import EvaluateReport
from regraft.evaluate.store import find, keep, params_digest, score_key, scores
from regraft.layout import Layout
from regraft.model.params import Quantization

PARAMS = EvaluateParams(max_new_tokens=8, threads=1)
PLAIN = Quantization(bits=16)
KEY = {"adapter": "a", "holdout": "h", "base": "b", "params": "p", "code": "c"}


@dataclass(frozen=True)
class Clone:
    layout: Layout
    adapter: Path


@pytest.fixture
def clone(place: Any, tmp_path: Path) -> Clone:
    layout = Layout(tmp_path)
    shutil.copytree(place.base, layout.stage("model"))
    shutil.copytree(place.dataset, layout.stage("preprocess"))
    layout.params.write_text(
        "model: {base: any, quantization: {bits: 16}}\nevaluate: {max_new_tokens: 8, threads: 1}\n", encoding="utf-8"
    )
    return Clone(layout, place.adapter)


def _evaluate(clone: Clone) -> EvaluateReport:
    return evaluate(
        PARAMS,
        PLAIN,
        base=clone.layout.stage("model"),
        dataset=clone.layout.stage("preprocess"),
        adapters={"challenger": clone.adapter},
        out=clone.layout.stage("evaluate"),
    )


@pytest.mark.parametrize("part", sorted(KEY))
def test_a_score_is_found_again_only_for_the_same_x(part: str) -> None:
    assert score_key(**KEY) == score_key(**dict(KEY))
    assert score_key(**KEY) != score_key(**{**KEY, part: "x"})
    assert len(score_key(**KEY)) == 16


def test_parameters_that_answers_do_not_depend_on_are_not_in_the_key() -> None:
    other = PARAMS.model_copy(update={"batch_size": 3, "batch_tokens": 9, "threads": 2, "slices": ["x"]})
    assert params_digest(other, PLAIN) == params_digest(PARAMS, PLAIN)
    for change in ({"max_new_tokens": 9}, {"max_rows": 5}, {"json_answers": True}):
        assert params_digest(PARAMS.model_copy(update=change), PLAIN) != params_digest(PARAMS, PLAIN)
    assert params_digest(PARAMS, Quantization()) != params_digest(PARAMS, PLAIN)


def test_the_score_of_an_evaluation_is_kept_and_found_without_scoring_again(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _evaluate(clone)
    kept = keep(clone.layout, clone.layout.stage("evaluate"), "challenger")
    monkeypatch.setattr("subprocess.Popen", None)
    assert scores(clone.layout, PARAMS, PLAIN, clone.adapter) == kept
    found = EvaluateReport.load(kept.report)
    assert (found.adapters, found.scores) == (
        {"adapter": report.adapters["challenger"]},
        {"adapter": report.scores["challenger"]},
    )
    assert read_answers(kept.answers) == read_answers(clone.layout.stage("evaluate") / "answers-challenger.parquet")
    assert keep(clone.layout, clone.layout.stage("evaluate"), "challenger") == kept
    assert len(list(clone.layout.scores.iterdir())) == 1


def test_a_champion_is_scored_once_in_a_process_of_its_own(clone: Clone) -> None:
    lines: list[str] = []
    stored = scores(clone.layout, PARAMS, PLAIN, clone.adapter, echo=lines.append)
    verify_dir(stored.report.parent)
    report = _evaluate(clone)
    alone = EvaluateReport.load(stored.report)
    assert alone.scores == {"adapter": report.scores["challenger"]}
    assert alone.code_digest == report.code_digest
    assert any("of 6 rows exact" in line for line in lines)
    lines.clear()
    assert scores(clone.layout, PARAMS, PLAIN, clone.adapter, echo=lines.append) == stored
    assert keep(clone.layout, clone.layout.stage("evaluate"), "challenger") == stored
    assert lines == []


def test_a_score_whose_bytes_were_altered_is_not_used(clone: Clone) -> None:
    _evaluate(clone)
    kept = keep(clone.layout, clone.layout.stage("evaluate"), "challenger")
    data = bytearray(kept.answers.read_bytes())
    data[len(data) // 2] ^= 1
    kept.answers.write_bytes(data)
    assert find(clone.layout, kept.report.parent.name) is None
    again = keep(clone.layout, clone.layout.stage("evaluate"), "challenger")
    assert again == kept
    assert find(clone.layout, kept.report.parent.name) == kept


def test_an_evaluation_without_such_an_adapter_has_nothing_to_keep(clone: Clone) -> None:
    _evaluate(clone)
    with pytest.raises(MissingInput, match="has no score of an adapter `champion`"):
        keep(clone.layout, clone.layout.stage("evaluate"), "champion")


def test_the_error_of_the_scoring_process_reaches_the_one_who_asked(
    clone: Clone, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    clone.layout.params.write_text("model: {base: any}\nevaluate: {max_new_token: 8}\n", encoding="utf-8")
    with pytest.raises(StageFailed, match="did you mean `max_new_tokens`") as caught:
        scores(clone.layout, PARAMS, PLAIN, clone.adapter)
    assert (caught.value.exit_code, caught.value.stage) == (2, "score")
    assert not clone.layout.scores.exists()


def test_a_failure_of_an_earlier_run_is_not_taken_for_this_one(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"type": "X", "message": "an old message", "fix": "none"}
    write_json(clone.layout.outcome("score"), {"run": "0" * 16, "exit_code": 1, "error": error})
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(StageFailed, match="ended with code 1"):
        scores(clone.layout, PARAMS, PLAIN, clone.adapter)
