"""Choosing a candidate and judging it: pure functions of the scores."""

from typing import Any

import pytest

from regraft.export.certificate import choose, judge
from regraft.export.params import ExportParams
from regraft.export.report import Candidate, Parity, Reference, Scores
from regraft.export.survival import Survived, overall

PARAMS = ExportParams(min_top1_agreement=0.98, max_mean_kl=0.02, max_exact_match_drop=0.01)
GOOD = {"top1_agreement": 0.98, "mean_kl": 0.02, "exact_match": 0.89}


def candidate(source: Any = "original", *, error: str | None = None, **figures: Any) -> Candidate:
    parity = Parity(**{"positions": 10, "max_kl": 1.0, "loss": 1.0, "same_answers": 1.0, **GOOD, **figures})
    return Candidate(source=source, digest="a" * 64, error=error, parity=None if error else parity)


def scores(*candidates: Candidate) -> Scores:
    reference = Reference(
        rows=4, held_out=4, holdout_digest="b" * 64, positions=10, loss=1.0, exact_match=0.9, quantized_modules=[]
    )
    return Scores(reference=reference, candidates=list(candidates), environment={})


def test_the_candidate_with_the_smallest_mean_divergence_is_chosen() -> None:
    near = candidate("dequantized", mean_kl=0.001, top1_agreement=0.5)

    assert choose(scores(candidate("original", mean_kl=0.002, top1_agreement=1.0), near)) == near


def test_a_candidate_that_was_not_measured_or_not_finite_is_never_chosen() -> None:
    assert choose(scores(candidate(error="broken"), candidate("dequantized", mean_kl=None))) is None


def test_figures_exactly_at_their_thresholds_pass() -> None:
    params = PARAMS.model_copy(update={"max_exact_match_drop": 0.9 - 0.89})
    found = candidate()

    assert judge(params, scores(found), found, {}).passed


@pytest.mark.parametrize(
    ("figures", "failed"),
    [
        ({"top1_agreement": 0.979}, "top1_agreement"),
        ({"mean_kl": 0.021}, "mean_kl"),
        ({"mean_kl": None}, "mean_kl"),
        ({"exact_match": 0.88}, "exact_match_drop"),
    ],
)
def test_one_figure_beyond_its_threshold_is_a_no(figures: dict[str, Any], failed: str) -> None:
    found = candidate(**{"exact_match": 0.9, **figures})

    verdict = judge(PARAMS, scores(found), found, {})

    assert [check.name for check in verdict.checks if not check.passed] == [failed]
    assert not verdict.passed


def layer(name: str, cosine: float, size: float) -> Survived:
    return Survived(name=name, cosine=cosine, norm=1.0, relative=0.01, size=size)


def test_a_merge_that_lost_its_change_is_a_no_that_names_the_layers() -> None:
    found = candidate(exact_match=0.9).model_copy(
        update={"survival": [layer("first", 0.9, 1.0), layer("second", 0.03, 3.0)]}
    )

    verdict = judge(PARAMS, scores(found), found, {})

    assert [check.name for check in verdict.checks if not check.passed] == ["delta_survival"]
    assert "second: cosine 0.030, norm 1.000 (a change of 1.00% of the weight)" in verdict.reasons[0]


def test_survival_weighs_layers_by_the_size_of_their_change() -> None:
    assert overall([layer("large", 1.0, 3.0), layer("small", 0.0, 1.0)]) == pytest.approx(0.9)
    assert overall([]) is None


def test_a_merged_model_that_answers_better_than_the_adapter_passes() -> None:
    found = candidate(exact_match=1.0)

    assert judge(PARAMS, scores(found), found, {}).passed


def test_without_a_measured_candidate_the_verdict_is_no_and_says_why() -> None:
    verdict = judge(PARAMS, scores(candidate(error="does not load")), None, {})

    assert not verdict.passed
    assert verdict.reasons == ["No evidence: no merged model could be measured (original: does not load)"]
