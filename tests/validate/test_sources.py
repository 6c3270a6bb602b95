"""Several sources: each file is read in its own way, told apart by a slice, and its share is expected."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from regraft.errors import DataError, GateRefused, ParamsError
from regraft.validate.params import DataParams

Chat = Callable[..., str]
SOURCES: dict[str, Any] = {
    "tickets": {"path": "data/raw/tickets", "layout": "prompt_answer", "prompt": "{q}", "answer": "{a}"},
    "notes": {"path": ["data/raw/*.txt.jsonl"], "layout": "text", "id": None},
}


def write(stage: Any, chat: Chat) -> None:
    (stage.root / "data/raw/tickets").mkdir()
    stage.write("tickets/one.csv", "q,a,n\nwhere,there,t-1\nwhen,then,t-2\n")
    stage.write("b.txt.jsonl", json.dumps({"text": "a note"}) + "\n")
    stage.write("c.jsonl", chat("hi", "ho", n="c-1"))


def test_each_source_is_read_with_its_own_columns_and_named_by_a_slice(stage: Any, chat: Chat) -> None:
    write(stage, chat)
    report = stage.run({"sources": SOURCES, "id": "n"})
    assert report.slices == {"source": {"notes": 1, "other": 1, "tickets": 2}}
    assert [(row["id"], [each["role"] for each in row["messages"]]) for row in stage.rows()] == [
        (None, ["text"]),
        ("c-1", ["user", "assistant"]),
        ("t-1", ["user", "assistant"]),
        ("t-2", ["user", "assistant"]),
    ]


def test_the_share_of_a_source_is_an_expectation_from_below_and_from_above(stage: Any, chat: Chat) -> None:
    write(stage, chat)
    shares = {"tickets": {"level": "block", "minimum": 0.5}, "notes": {"maximum": 0.2}, "other": {"minimum": 0.25}}
    stage.write("d.jsonl", "{\n" * 3)  # what is quarantined is in no share
    expectations = {"sources": shares, "quarantined": {"share": 1.0}, "files": {"level": "warn"}}
    report = stage.run({"sources": SOURCES, "id": "n"}, expectations=expectations)
    found = {each.name: (each.passed, each.measured) for each in report.expectations if each.name.startswith("sources")}
    assert found == {
        "sources.notes.maximum": (False, 0.25),
        "sources.other.minimum": (True, 0.25),
        "sources.tickets.minimum": (True, 0.5),
    }
    with pytest.raises(GateRefused, match=r"sources\.tickets\.minimum: measured 0\.5, threshold 0\.6"):
        stage.run(
            {"sources": SOURCES, "id": "n"}, expectations={"sources": {"tickets": {"level": "block", "minimum": 0.6}}}
        )


@pytest.mark.parametrize(
    ("sources", "kind", "says"),
    [
        ({"a": {"path": "data/raw/tickets"}, "b": {"path": "data/raw"}}, ParamsError, "is in two sources, a and b"),
        ({"a": {"path": "data/raw/none"}}, DataError, "data.sources.a: `data/raw/none` is not there"),
        ({"a": {"path": "elsewhere"}}, DataError, "data.sources.a names elsewhere/x.jsonl, which data.raw does not"),
        (
            {"tickets": {**SOURCES["tickets"], "answer": "{answer}"}},
            ParamsError,
            "in source `tickets`: data.answer names the column `answer`",
        ),
    ],
)
def test_sources_that_contradict_the_files_are_refused(
    stage: Any, chat: Chat, sources: dict[str, Any], kind: type[Exception], says: str
) -> None:
    write(stage, chat)
    (stage.root / "elsewhere").mkdir()
    (stage.root / "elsewhere/x.jsonl").write_text(chat("hi"))
    with pytest.raises(kind) as caught:
        stage.run({"sources": sources})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"sources": {"other": {"path": "data/raw"}}},
        {"sources": {"a": {"path": []}}},
        {"sources": {"a": {"path": "x", "layout": "prompt_answer"}}},
        {"sources": {"a": {"path": "x"}}, "slices": ["source"]},
        {"sources": {"a": {"path": "x", "layout": "text", "tools": "tools"}}},
    ],
)
def test_sources_that_contradict_each_other_are_mistakes(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="source"):
        DataParams.model_validate(data)


def test_a_share_of_a_source_that_there_is_not_is_a_mistake(stage: Any, chat: Chat) -> None:
    write(stage, chat)
    with pytest.raises(ParamsError, match=r"expectations\.sources names tickts; data\.sources has tickets, notes"):
        stage.run({"sources": SOURCES}, expectations={"sources": {"tickts": {"minimum": 0.1}}})


def test_only_an_empty_slice_differs_where_there_is_no_source(stage: Any, chat: Chat) -> None:
    stage.write("c.jsonl", chat("hi", "ho"))
    stage.run()
    assert stage.rows()[0]["slices"] == []
