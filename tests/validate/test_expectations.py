from collections import Counter

import pytest

from regraft.validate.expectations import Counts, expected
from regraft.validate.params import Expectations, Reason


def counts() -> Counts:
    return Counts(
        rows_in=200,
        accepted=180,
        duplicates=10,
        reasons=Counter({Reason.EMAIL: 4}),
        slices={"action": Counter({"a": 100, "b": 79, "c": 1})},
        unreadable={"x.jsonl": "it is empty"},
    )


def holds(settings: dict[str, object]) -> dict[str, bool]:
    return {each.name: each.holds for each in expected(Expectations.model_validate(settings), counts())}


@pytest.mark.parametrize(
    ("name", "at_the_limit", "beyond"),
    [
        ("rows", {"minimum": 180}, {"minimum": 181}),
        ("quarantined", {"share": 0.1}, {"share": 0.0999}),
        ("duplicates", {"share": 0.05}, {"share": 0.0499}),
        ("files", {"unreadable": 1}, {"unreadable": 0}),
    ],
)
def test_a_threshold_is_fulfilled_at_the_limit_and_not_beyond(
    name: str, at_the_limit: dict[str, object], beyond: dict[str, object]
) -> None:
    assert holds({name: at_the_limit})[name]
    assert not holds({name: beyond})[name]


def test_a_reason_and_a_slice_are_judged_where_they_are_named() -> None:
    settings = {
        "reasons": {"email": {"share": 0.01}, "secret": {"share": 0.0}},
        "slices": {"action": {"minimum": 79, "values": ["a", "d"]}, "length": {"minimum": 1}},
    }
    found = {each.name: each for each in expected(Expectations.model_validate(settings), counts())}
    assert list(found) == [
        *("rows", "quarantined", "duplicates", "files", "reasons.secret", "reasons.email")[:4],
        *("reasons.email", "reasons.secret", "slices.action", "slices.action.values", "slices.length"),
    ]
    assert (found["reasons.email"].measured, found["reasons.email"].rows, found["reasons.email"].holds) == (
        0.02,
        4,
        False,
    )
    assert found["reasons.secret"].holds
    assert (found["slices.action"].measured, found["slices.action"].rows) == (1, 1)
    assert found["slices.action"].detail == "c (1)"
    assert (found["slices.action.values"].measured, found["slices.action.values"].detail) == (1, "d")
    assert not found["slices.length"].holds


def test_the_sentence_in_the_docs_has_nothing_of_the_data() -> None:
    found = {each.name: each for each in expected(Expectations(), counts())}
    assert found["quarantined"].sentence == "share of rows quarantined: 0.1, expected at most 0.1 (block)"
