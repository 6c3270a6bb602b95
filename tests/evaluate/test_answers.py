import math
from pathlib import Path

import pytest

from regraft.errors import DamagedArtifact, MissingInput
from regraft.evaluate.answers import Answer, is_json, read_answers, same_answer, summarise, write_answers


def _answer(row_id: str, *, exact: bool = True, loss: float = 2.0, tokens: int = 4, **slices: str) -> Answer:
    return Answer(row_id, slices, "yes", "yes" if exact else "no", loss, tokens, exact, None, True)


@pytest.mark.parametrize(
    ("generated", "answer", "equal"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', True),
        (' {"a": "é"}\n', '{"a": "\\u00e9"}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1, "a": 1}', '{"a": 1}', False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ("not JSON", " not JSON ", True),
        ("", '{"a": 1}', False),
    ],
)
def test_json_answers_are_equal_when_their_values_are(generated: str, answer: str, equal: bool) -> None:
    assert same_answer(generated, answer, json_answers=True) is equal


def test_text_answers_are_equal_only_as_text() -> None:
    assert same_answer(" 42\n", "42", json_answers=False)
    assert not same_answer('{"a":1}', '{"a": 1}', json_answers=False)


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", '{"a": Infinity}', "1e999", '"\\ud800"', '{"a":1,"a":2}', "[" * 100_000]
)
def test_what_is_not_interoperable_json_is_invalid(text: str) -> None:
    assert not is_json(text)


@pytest.mark.parametrize("text", ["{}", "[1, null]", '"x"', " 3.5 "])
def test_any_json_value_is_valid(text: str) -> None:
    assert is_json(text)


def test_answers_come_back_from_the_file_as_they_were_in_the_order_of_row_ids(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    write_answers(path, [_answer("b", register="casual", action="track"), _answer("a", exact=False, loss=0.1)])
    assert read_answers(path) == [
        _answer("a", exact=False, loss=0.1),
        _answer("b", register="casual", action="track"),
    ]


def test_equal_answers_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    rows = [_answer("a", x="1", y="2"), _answer("b")]
    swapped = [_answer("b"), _answer("a", y="2", x="1")]
    write_answers(tmp_path / "one", rows)
    write_answers(tmp_path / "two", swapped)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_loss_that_is_not_finite_survives_the_file(tmp_path: Path) -> None:
    write_answers(tmp_path / "answers", [_answer("a", loss=float("nan")), _answer("b", loss=float("inf"))])
    first, second = read_answers(tmp_path / "answers")
    assert math.isnan(first.loss)
    assert second.loss == float("inf")


def test_a_missing_table_and_one_that_is_none_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="is missing"):
        read_answers(tmp_path / "answers")
    (tmp_path / "answers").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DamagedArtifact, match="is not a table of answers"):
        read_answers(tmp_path / "answers")


def test_a_table_with_other_columns_with_nulls_or_a_row_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "answers"
    write_answers(path, [_answer("a"), _answer("b")])
    good = pq.read_table(path)
    for bad, problem in (
        (good.drop_columns(["exact"]), "exact"),
        (good.set_column(6, "exact", pa.array([True, None])), "row 1: `exact` is null"),
        (good.set_column(0, "row_id", pa.array(["a", "a"])), "not unique and in order"),
        (good.set_column(0, "row_id", pa.array(["b", "a"])), "not unique and in order"),
        (good.set_column(4, "loss", pa.array(["x", "y"])), "Failed to parse"),
    ):
        pq.write_table(bad, path)
        with pytest.raises(DamagedArtifact, match=problem):
            read_answers(path)


def test_averages_weigh_losses_by_tokens_and_answers_by_rows() -> None:
    rows = [_answer("a", loss=1.0, tokens=1, kind="x"), _answer("b", exact=False, loss=2.0, tokens=9, kind="y")]
    scores = summarise(rows, ["kind"])
    assert scores.overall.model_dump() == {
        "rows": 2,
        "exact_match": 0.5,
        "json_valid": None,
        "stopped": 1.0,
        "loss": 0.3,
        "perplexity": math.exp(0.3),
        "non_finite": 0,
    }
    assert {value: score.exact_match for value, score in scores.slices["kind"].items()} == {"x": 1.0, "y": 0.0}


def test_a_loss_that_is_not_finite_leaves_no_average_and_is_counted() -> None:
    overall = summarise([_answer("a"), _answer("b", loss=float("nan"))], []).overall
    assert (overall.loss, overall.perplexity, overall.non_finite) == (None, None, 1)
