import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from regraft.errors import DamagedArtifact, MissingInput
from regraft.gates.verdict import (
    Check,
    Verdict,
    at_least,
    at_most,
    closed,
    decide,
    explain,
    load_verdict,
    none_of,
    refuse,
    same,
    save_verdict,
)

GOOD = Check(name="good", passed=True, detail="All is well.")
BAD = Check(name="bad", passed=False, detail="Something is wrong.")
HINT = Check(name="hint", passed=False, detail="By the way.", decisive=False)
JUDGED = {"adapter": "a" * 64, "champion": "none"}
NAN = float("nan")


def test_a_verdict_passes_only_if_every_decisive_check_does() -> None:
    assert decide("g", [GOOD, HINT], JUDGED).passed
    assert decide("g", [GOOD, BAD], JUDGED).reasons == ["Something is wrong."]


def test_a_verdict_without_a_decisive_check_is_a_no() -> None:
    for checks in ([], [HINT]):
        verdict = decide("g", checks, JUDGED)
        assert (verdict.passed, verdict.reasons) == (False, ["No evidence: nothing was checked"])


@pytest.mark.parametrize("change", [{"passed": True}, {"reasons": []}, {"checks": []}])
def test_a_verdict_that_contradicts_its_own_checks_cannot_be_read(change: dict[str, object]) -> None:
    content = {**decide("g", [GOOD, BAD], JUDGED).to_dict(), **change}
    with pytest.raises(ValidationError, match="follow from the checks"):
        Verdict.model_validate(content)


@pytest.mark.parametrize("error", [MissingInput("no report"), DamagedArtifact("no report"), OSError("no report")])
def test_evidence_that_is_missing_or_unreadable_is_a_no_with_the_reason(error: Exception) -> None:
    def question() -> Verdict:
        raise error

    verdict = closed("g", JUDGED, question)
    assert (verdict.passed, verdict.reasons, verdict.judged) == (False, ["No evidence: no report"], JUDGED)


def test_a_digest_that_differs_or_is_not_there_is_no_evidence() -> None:
    assert same({"base": "b" * 64}, {"base": "b" * 64, "more": "x"}, "the report") == []
    (differs,) = same({"base": "b" * 64}, {"base": "c" * 64}, "the report")
    assert differs.detail == (
        "No evidence: the report is about the base cccccccccccccccc, to be judged is bbbbbbbbbbbbbbbb"
    )
    (absent,) = same({"base": "b" * 64}, {}, "the report")
    assert not absent.passed


def test_what_is_not_a_number_satisfies_no_threshold_and_is_saved_as_null() -> None:
    for check in (at_least("x", NAN, 0, "x"), at_most("x", NAN, 0, "x"), at_least("x", float("inf"), 0, "x")):
        assert not check.passed
        assert check.measured is None


def test_thresholds_are_part_of_what_is_allowed() -> None:
    assert at_least("x", 0.5, 0.5, "Share").passed
    assert at_most("x", 0.5, 0.5, "Share").passed
    assert not at_least("x", 0.4999, 0.5, "Share").passed
    assert at_least("x", 0.25, 0.5, "Share").detail == "Share: 0.25, but at least 0.5 is asked for."
    assert at_most("x", 3, 2, "Rows").detail == "Rows: 3, but at most 2 is allowed."


def test_what_must_not_occur_is_listed_up_to_five() -> None:
    check = none_of("x", range(7), "Broken rows")
    assert (check.passed, check.measured, check.detail) == (False, 7, "Broken rows: 0, 1, 2, 3, 4 and 2 more.")
    assert none_of("x", [], "Broken rows").passed


def test_the_explanation_begins_with_the_answer_and_what_speaks_against() -> None:
    assert explain(decide("g", [GOOD, HINT, BAD], JUDGED)) == [
        "No: challenger aaaaaaaa, no champion yet.",
        "against: Something is wrong.",
        "All is well.",
        "By the way.",
    ]


def test_of_a_run_that_went_well_only_the_comparison_is_explained() -> None:
    checks = [GOOD.model_copy(update={"name": name}) for name in ("data.rows", "comparison.slice[a=b]")]
    checks.append(GOOD.model_copy(update={"name": "comparison.better_new", "detail": "It is better."}))
    assert explain(decide("run", checks, {**JUDGED, "champion": "c" * 64})) == [
        "Yes: challenger aaaaaaaa, champion cccccccc.",
        "It is better.",
    ]


def test_a_saved_verdict_comes_back_with_its_summary_beside_it(tmp_path: Path) -> None:
    verdict = decide("run", [GOOD, BAD], JUDGED)
    digest = save_verdict(verdict, tmp_path / "verdict")
    assert load_verdict(tmp_path / "verdict") == verdict
    assert sorted(path.name for path in (tmp_path / "verdict").iterdir()) == [
        "manifest.json",
        "summary.txt",
        "verdict.json",
    ]
    assert (tmp_path / "verdict/summary.txt").read_text() == (
        "No: challenger aaaaaaaa, no champion yet.\nagainst: Something is wrong.\n"
    )
    assert save_verdict(verdict, tmp_path / "verdict") == digest


def test_an_altered_verdict_is_not_read(tmp_path: Path) -> None:
    save_verdict(refuse("run", "none", JUDGED), tmp_path / "verdict")
    path = tmp_path / "verdict/verdict.json"
    path.write_text(json.dumps(decide("run", [GOOD], JUDGED).to_dict()))
    with pytest.raises(DamagedArtifact, match=r"verdict\.json"):
        load_verdict(tmp_path / "verdict")
    with pytest.raises(MissingInput):
        load_verdict(tmp_path / "nowhere")
