"""Other tools' conversations."""

from pathlib import Path
from typing import Any

import pytest

from regraft.errors import ParamsError
from regraft.validate.mapping import Mapping, check_columns
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.source import find_files

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
KINDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho"},
    "prompt_completion": {"prompt": "hi", "completion": "ho"},
}


def turns(record: dict[str, Any], layout: str, **more: Any) -> list[dict[str, str]] | None:
    row = Mapping(DataParams.model_validate({"layout": layout, **more}), ValidateParams()).row(record)
    return None if row is None else row.messages


@pytest.mark.parametrize("layout", KINDS)
def test_a_row_of_each_layout_is_the_same_conversation_named_or_detected(layout: str) -> None:
    assert turns(KINDS[layout], layout) == turns(KINDS[layout], "auto") == CHAT
    assert turns({"text": "hi"}, layout) is None
    assert turns({**KINDS[layout], "id": 7}, "auto") == CHAT


def test_messages_in_a_column_called_conversations_are_told_by_their_keys() -> None:
    assert turns({"conversations": CHAT}, "auto") == CHAT
    assert turns({"messages": KINDS["sharegpt"]["conversations"]}, "auto") == CHAT
    assert turns({"talk": KINDS["sharegpt"]["conversations"]}, "sharegpt", messages="talk") == CHAT


def test_an_input_follows_its_instruction_and_a_system_text_comes_first() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"}
    assert turns(row, "alpaca") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert turns({**row, "input": None, "system": None}, "alpaca") == [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "3"},
    ]
    assert turns({**row, "output": None}, "alpaca") is None


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    assert turns({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion") == CHAT
    assert turns({"prompt": "hi", "completion": CHAT[1:]}, "prompt_completion") is None


def test_an_unknown_speaker_is_quarantined_for_his_role() -> None:
    record = {"conversations": [{"from": "human", "value": "hi"}, {"from": "tool", "value": "x"}]}
    row = Mapping(DataParams(layout="sharegpt"), ValidateParams()).row(record)
    assert row is not None
    assert {reason.value for reason in row.reasons} == {"wrong_roles"}


def test_columns_that_no_layout_has_are_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "hi", "reply": "ho"}\n')
    files = find_files(["x.jsonl"], tmp_path)[0]
    with pytest.raises(ParamsError, match=r"x\.jsonl has no known layout: expected a list in `messages`") as failure:
        check_columns(DataParams(layout="auto"), files, 100)
    assert "columns found: question, reply" in failure.value.message


def test_several_sources_may_differ_in_layout(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "hi", "output": "ho"}\n')
    (tmp_path / "b.csv").write_text("prompt,completion\nhi,ho\n")
    check_columns(DataParams(layout="auto"), find_files(["a.jsonl", "b.csv"], tmp_path)[0], 100)
