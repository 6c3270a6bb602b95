"""Conversations that call tools, and plain texts."""

import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from regraft.errors import ParamsError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def call(arguments: Any = '{"town": "Bonn", "a": 1}', name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}} | more


def turns(*, calls: Any = None, result: Any = "rain", **last: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "weather in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": [call()] if calls is None else calls},
        {"role": "tool", "content": result, "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "It rains.", **last},
    ]


def line(messages: Any, tools: Any = TOOLS) -> str:
    return json.dumps({"messages": messages, "tools": tools}) + "\n"


def reasons(stage: Any, messages: Any, tools: Any = TOOLS, **params: Any) -> list[str]:
    stage.write("a.jsonl", line(messages, tools) + line(turns()))
    stage.run({"tools": "tools"}, **params)
    kept = stage.quarantine()
    return list(kept[0]["reasons"]) if kept else []


def test_calls_and_definitions_are_kept_in_the_order_in_which_they_were_written(stage: Any) -> None:
    stage.write("a.jsonl", line(turns()))
    stage.run({"tools": "tools"})
    [row] = stage.rows()
    assert json.loads(row["messages"][0]["tools"]) == TOOLS
    assert row["messages"][1]["tool_calls"] == (
        '[{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn", "a": 1}}}]'
    )
    assert (row["messages"][2]["tool_call_id"], row["messages"][2]["name"]) == ("c1", "weather")
    assert row["messages"][1]["content"] == ""


def test_arguments_as_an_object_and_as_text_are_the_same_row(stage: Any) -> None:
    stage.write("a.jsonl", line(turns()) + line(turns(calls=[call({"town": "Bonn", "a": 1})]), json.dumps(TOOLS)))
    report = stage.run({"tools": "tools"})
    assert report.rows_duplicate == 1


def test_without_the_parameter_rows_that_call_tools_are_quarantined_and_the_file_has_its_old_columns(
    stage: Any,
) -> None:
    stage.write(
        "a.jsonl", line(turns()) + line([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    )
    report = stage.run()
    assert report.quarantined_by_reason == {"wrong_shape": 1}
    assert "tools" not in str(pq.read_schema(stage.root / "out/rows.parquet"))


@pytest.mark.parametrize(
    ("messages", "tools", "found"),
    [
        (turns(calls=[call("{not json")]), TOOLS, ["wrong_tools"]),
        (turns(calls=[call("[1]")]), TOOLS, ["wrong_tools"]),
        (turns(calls=[call(name="sun")]), TOOLS, ["wrong_tools"]),
        (turns(calls=[{"id": "c1"}]), TOOLS, ["wrong_tools"]),
        (turns(calls={"id": "c1"}), TOOLS, ["wrong_tools"]),
        (turns(calls=[call(id="c2")]), TOOLS, ["wrong_tools"]),
        (turns(), "nothing", ["wrong_tools"]),
        (turns(), [{"name": "weather"}], ["wrong_tools"]),
        (turns()[:3], TOOLS, ["missing_answer"]),
        ([turns()[0], *turns()[2:]], TOOLS, ["wrong_roles", "wrong_tools"]),
        (turns(calls=[]), TOOLS, ["wrong_shape"]),
        (turns(content="  "), TOOLS, ["empty_text"]),
        (turns(result=""), TOOLS, []),
        (turns(), None, []),
        (turns()[:2], TOOLS, []),
        (turns(calls=[call(json.dumps({"mail": "someone@example.com"}))]), TOOLS, ["email"]),
        (turns(calls=[call(json.dumps({"x": "a\u0000b"}))]), TOOLS, ["control_characters"]),
        (turns(audio="x"), TOOLS, ["wrong_shape"]),
        ("messages", TOOLS, ["wrong_shape"]),
        ([1], TOOLS, ["wrong_shape"]),
    ],
)
def test_what_no_template_could_render_or_no_model_should_learn_is_quarantined(
    stage: Any, messages: Any, tools: Any, found: list[str]
) -> None:
    assert reasons(stage, messages, tools) == found


def test_an_answer_that_is_a_call_need_not_be_json_and_has_no_label(stage: Any) -> None:
    stage.write("a.jsonl", line(turns()[:2]))
    report = stage.run({"tools": "tools"}, answers_are_json=True, labels={"allowed": ["x"]})
    assert report.rows_out == 1


def test_a_column_of_tools_that_is_nowhere_is_a_mistake(stage: Any) -> None:
    stage.write("a.jsonl", line(turns()))
    with pytest.raises(ParamsError, match=r"data\.tools names the column `tool`, which is in no file"):
        stage.run({"tools": "tool"})


def test_a_plain_text_is_one_message_and_its_row_is_judged_like_any_other(stage: Any) -> None:
    texts = ["one text", " ", "call someone@example.com", 7, "one text"]
    stage.write("a.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in texts))
    report = stage.run({"layout": "text", "messages": "body"}, answers_are_json=True)
    assert [row["messages"] for row in stage.rows()] == [[{"role": "text", "content": "one text"}]] * 2
    assert report.quarantined_by_reason == {"wrong_shape": 1, "empty_text": 1, "email": 1}
    assert report.rows_duplicate == 1


def test_a_role_called_text_is_wrong_in_a_conversation(stage: Any) -> None:
    stage.write("a.jsonl", json.dumps({"messages": [{"role": "text", "content": "x"}]}) + "\n")
    assert stage.run(expectations={"rows": {"minimum": 0}, "quarantined": {"share": 1.0}}).quarantined_by_reason == {
        "wrong_roles": 1
    }
