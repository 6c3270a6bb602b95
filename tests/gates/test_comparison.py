from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from regraft.evaluate.answers import Answer
from regraft.gates.comparison import compare
from regraft.gates.params import ComparisonGate
from regraft.gates.verdict import Check, Verdict, explain

Table = list[Answer]
Make = Callable[..., Table]
JUDGED = {"adapter": "a" * 64, "champion": "c" * 64, "holdout": "h" * 64}
FIRST = {**JUDGED, "champion": "none"}
DEFAULT = ComparisonGate()


def _ids(table: Table) -> set[str]:
    return {row.row_id for row in table}


def _check(verdict: Verdict, name: str) -> Check:
    return next(each for each in verdict.checks if each.name == name)


def _failed(verdict: Verdict) -> list[str]:
    return [each.name for each in verdict.checks if each.decisive and not each.passed]


def _against(challenger: Table, champion: Table, known: Any = None, params: ComparisonGate = DEFAULT) -> Verdict:
    return compare(params, challenger, champion, known_rows=_ids(champion) if known is None else known, judged=JUDGED)


def test_a_challenger_that_learned_the_new_action_and_kept_the_old_ones_wins(table: Make) -> None:
    old = {"action": "track_order"}
    new = {"action": "book_repair"}
    champion = table([True] * 285 + [False] * 15, slices=old) + table([False] * 63, first=300, slices=new)
    challenger = table([True] * 280 + [False] * 5 + [True] * 15, slices=old)
    challenger += table([True] * 60 + [False] * 3, first=300, slices=new)
    verdict = _against(challenger, champion, _ids(champion[:300]))
    assert verdict.passed
    assert verdict.reasons == []
    better = _check(verdict, "better_new")
    assert (better.rows, better.measured, better.threshold) == (63, pytest.approx(60 / 63), 0.0)
    assert better.detail.startswith(
        "On the 63 new rows (action=book_repair) the challenger answers 95.2 % exactly, the champion 0 % "
        "(difference +0.952, 97.5 % interval 0."
    )
    assert better.detail.endswith(": better.")
    assert _check(verdict, "not_worse").rows == 300
    assert _check(verdict, "slice[action=track_order]").rows == 300


def test_the_same_adapter_is_never_better_than_itself(table: Make) -> None:
    rows = table([True] * 200)
    judged = {**JUDGED, "champion": JUDGED["adapter"]}
    verdict = compare(DEFAULT, rows, rows, known_rows=_ids(rows), judged=judged)
    assert not verdict.passed
    assert verdict.reasons == ["The challenger is the same adapter."]


def test_two_perfect_models_with_nothing_new_change_nothing_and_the_verdict_says_why(table: Make) -> None:
    rows = table([True] * 500)
    verdict = _against(rows, rows)
    assert _failed(verdict) == ["better_overall"]
    assert "the champion leaves nothing to gain" in verdict.reasons[0]


def test_one_that_is_not_worse_replaces_a_champion_that_is_to_forget_rows_and_a_worse_one_does_not(table: Make) -> None:
    rows = table([True] * 500)

    def against(challenger: Table) -> Verdict:
        return compare(DEFAULT, challenger, rows, known_rows=_ids(rows), judged=JUDGED, forgets=True)

    verdict = against(rows)
    assert verdict.passed
    assert "rows that are to be forgotten" in _check(verdict, "forgets").detail
    assert not _check(verdict, "better_overall").passed
    assert "not_worse" in _failed(against(table([True] * 440 + [False] * 60)))


def test_a_gain_on_new_rows_does_not_pay_for_a_loss_on_the_known_ones(table: Make) -> None:
    champion = table([True] * 300) + table([False] * 100, first=300)
    challenger = table([True] * 270 + [False] * 30) + table([True] * 100, first=300)
    verdict = _against(challenger, champion, _ids(champion[:300]))
    assert _check(verdict, "better_new").passed
    assert _failed(verdict) == ["not_worse", "retention"]
    assert "worse, and perhaps by more than 0.05" in _check(verdict, "not_worse").detail


def test_a_slice_that_got_worse_refuses_although_the_whole_got_better(table: Make) -> None:
    def action(index: int) -> dict[str, str]:
        return {"action": "rare" if index < 50 else "common"}

    champion = table([True] * 50 + [False] * 150 + [True] * 300, slices=action)
    challenger = table([False] * 20 + [True] * 480, slices=action)
    verdict = _against(challenger, champion)
    assert _failed(verdict) == ["slices"]
    assert "In 1 of 2 slices it is not shown to be no worse. action=rare, 50 rows" in verdict.reasons[0]


def test_a_slice_with_too_few_rows_is_named_and_not_judged(table: Make) -> None:
    def action(index: int) -> dict[str, str]:
        return {"action": "rare" if index < 29 else "common"}

    champion = table([True] * 29 + [False] * 60 + [True] * 411, slices=action)
    challenger = table([False] * 3 + [True] * 497, slices=action)
    verdict = _against(challenger, champion)
    assert verdict.passed
    assert "Too small to judge (under 30 rows): action=rare (29)." in _check(verdict, "slices").detail
    assert [each.name for each in verdict.checks if each.name.startswith("slice[")] == ["slice[action=common]"]


def test_answers_that_were_right_must_stay_right_even_where_others_make_up_for_them(table: Make) -> None:
    champion = table([True] * 300 + [False] * 100)
    challenger = table([False] * 60 + [True] * 340)
    verdict = _against(challenger, champion, params=DEFAULT.model_copy(update={"margin": 0.1}))
    assert _failed(verdict) == ["retention"]
    assert _check(verdict, "retention").measured == pytest.approx(240 / 300)


def test_few_rows_that_agree_are_not_evidence_that_nothing_got_worse(table: Make) -> None:
    params = DEFAULT.model_copy(update={"min_rows": 20, "retention": 0.0, "floor": 0.0})
    rows = table([True] * 40)
    verdict = _against(rows, rows, params=params)
    assert not _check(verdict, "not_worse").passed
    assert "a drop of 0.05 cannot be ruled out" in _check(verdict, "not_worse").detail


def test_too_few_new_rows_are_reported_and_do_not_count_on_their_own(table: Make) -> None:
    champion = table([True] * 300) + table([False] * 19, first=300)
    challenger = table([True] * 319)
    verdict = _against(challenger, champion, _ids(champion[:300]))
    assert [each.name for each in verdict.checks[:2]] == ["better_overall", "new_rows"]
    assert _check(verdict, "new_rows").detail == "19 rows are new, too few to count on their own (at least 20)."
    assert _check(verdict, "better_overall").rows == 319
    assert verdict.passed


def test_where_hardly_a_known_row_is_left_all_rows_stand_in_and_the_verdict_says_so(table: Make) -> None:
    champion, challenger = table([False] * 200 + [True] * 100), table([True] * 300)
    verdict = _against(challenger, champion, {champion[0].row_id})
    assert verdict.passed
    assert "On all 300 rows (the champion was judged on only 1 of them)" in _check(verdict, "not_worse").detail


def test_without_a_champion_the_challenger_must_beat_the_base_and_reach_the_floor(table: Make) -> None:
    base = table([False] * 400)
    good, weak = table([True] * 380 + [False] * 20), table([True] * 200 + [False] * 200)
    assert compare(DEFAULT, good, base, known_rows=None, judged=FIRST).passed
    assert _failed(compare(DEFAULT, weak, base, known_rows=None, judged=FIRST)) == ["floor"]
    assert _failed(compare(DEFAULT, good, good, known_rows=None, judged=FIRST)) == ["better_overall"]


def test_a_challenger_under_the_floor_cannot_follow_a_champion_that_fell_too(table: Make) -> None:
    champion, challenger = table([True] * 40 + [False] * 360), table([True] * 180 + [False] * 220)
    assert _failed(_against(challenger, champion)) == ["floor"]


def test_rows_that_only_one_of_them_answered_are_no_evidence(table: Make) -> None:
    verdict = _against(table([True] * 200), table([False] * 200, first=1))
    assert verdict.reasons == [
        "No evidence: of the challenger's rows, the champion did not answer 1, and it answered 1 others"
    ]


def test_another_expected_answer_to_the_same_row_is_no_evidence(table: Make) -> None:
    rows = table([True] * 200)
    verdict = _against(rows, [replace(rows[0], answer="other"), *rows[1:]])
    assert verdict.reasons == [
        "No evidence: 1 rows have another expected answer for the champion than for the challenger"
    ]


def test_too_few_rows_are_no_evidence(table: Make) -> None:
    verdict = _against(table([True] * 99), table([False] * 99))
    assert verdict.reasons == ["No evidence: 99 held-out rows; at least 100 are asked for"]
    assert not _against([], []).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["challenger", "champion"])
def test_a_loss_that_is_not_finite_is_no_evidence_on_either_side(table: Make, bad: float, side: str) -> None:
    tables = {"challenger": table([True] * 200), "champion": table([False] * 200)}
    tables[side][7] = replace(tables[side][7], loss=bad)
    verdict = _against(tables["challenger"], tables["champion"])
    assert verdict.reasons == [f"No evidence: the loss of the {side} is not finite on 1 of 200 rows"]


def test_losses_are_reported_and_decide_only_where_a_margin_is_set(table: Make) -> None:
    random = np.random.default_rng(0)
    champion = table([False] * 150 + [True] * 150, loss=(1 + random.exponential(size=300)).tolist())
    challenger = table([True] * 300, loss=(4 + random.exponential(size=300)).tolist())
    reported = _check(_against(challenger, champion), "loss")
    assert (reported.passed, reported.decisive) == (True, False)
    assert reported.measured == pytest.approx(0.3, abs=0.02)  # nats a token: 3 nats over 10 tokens
    judged = _against(challenger, champion, params=DEFAULT.model_copy(update={"loss_margin": 0.1}))
    assert _failed(judged) == ["loss"]
    assert "may be higher by more than 0.1" in judged.reasons[0]
    assert _against(challenger, champion, params=DEFAULT.model_copy(update={"loss_margin": 0.5})).passed


def test_the_explanation_says_yes_or_no_first_and_then_what_speaks_against_it(table: Make) -> None:
    champion = table([True] * 300) + table([False] * 100, first=300)
    challenger = table([True] * 270 + [False] * 30) + table([True] * 100, first=300)
    lines = explain(_against(challenger, champion, _ids(champion[:300])))
    assert lines[0] == "No: challenger aaaaaaaa, champion cccccccc."
    assert [line.startswith("against: ") for line in lines[1:4]] == [True, True, False]


def _simulated(
    random: np.random.Generator, *, known: tuple[float, float], new: tuple[float, float], spread: float
) -> tuple[list[bool], list[bool]]:
    """Draw right answers of (champion, challenger) on 500 known and 60 new rows; some rows are hard for both."""
    rows = {500: known, 60: new}
    champion: list[bool] = []
    challenger: list[bool] = []
    for count, chances in rows.items():
        hard = random.normal(scale=spread, size=count)
        draws = [random.random(count) < np.clip(chance + hard, 0, 1) for chance in chances]
        champion += draws[0].tolist()
        challenger += draws[1].tolist()
    return champion, challenger


def _promoted(table: Make, times: int, seed: int, **chances: tuple[float, float]) -> float:
    random = np.random.default_rng(seed)
    params = DEFAULT.model_copy(update={"retention": 0.5})  # chance alone loses many right answers in this model
    promoted = 0
    for _ in range(times):
        champion, challenger = _simulated(random, spread=0.1, **chances)
        rows = table(champion)
        promoted += _against(table(challenger), rows, _ids(rows[:500]), params).passed
    return promoted / times


def test_a_challenger_that_is_no_better_is_promoted_no_more_often_than_the_confidence_says(table: Make) -> None:
    rate = _promoted(table, 400, seed=1, known=(0.9, 0.9), new=(0.9, 0.9))
    assert rate <= 0.025 + 3 * (0.025 * 0.975 / 400) ** 0.5


def test_a_challenger_at_the_margin_is_promoted_no_more_often_than_the_confidence_says(table: Make) -> None:
    rate = _promoted(table, 300, seed=2, known=(0.9, 0.85), new=(0.0, 0.9))
    assert rate <= 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5


def test_a_challenger_that_learned_something_new_and_lost_nothing_is_nearly_always_promoted(table: Make) -> None:
    assert _promoted(table, 100, seed=3, known=(0.95, 0.95), new=(0.0, 0.9)) >= 0.9
