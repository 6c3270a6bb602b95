"""What `regraft data show` shows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from regraft.chat import open_chat
from regraft.preprocess.show import show_rows
from regraft.validate import personal
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.text_params import Personal

CHAT = [{"role": "user", "content": "mail me@example.com"}, {"role": "assistant", "content": "yes"}]


def test_rows_are_shown_rendered_with_what_is_learned_and_without_personal_data(tmp_path: Path) -> None:
    lines = [{"messages": CHAT}, {"instruction": "where is my lamp", "output": "track"}, {"messages": CHAT[:1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    found = show_rows(
        DataParams(raw=["a.jsonl"], layout="auto"),
        ValidateParams(),
        root=tmp_path,
        count=4,
        chat=open_chat(tiny.make_tokenizer()),
        supervise="assistant",
    )
    assert [(each.place, each.layout, each.reasons) for each in found] == [
        ("a.jsonl:1", "messages", ["email"]),
        ("a.jsonl:2", "alpaca", []),
        ("a.jsonl:3", "messages", ["missing_answer", "email"]),
        ("a.jsonl:4", "auto", ["not_json"]),
    ]
    before = "<|im_start|>user\nwhere is my lamp<|im_end|>\n<|im_start|>assistant\n"
    assert found[1].pieces == [(before, False), ("track<|im_end|>", True), ("\n", False)]
    assert 0 < found[1].learned < found[1].tokens
    assert "me@" not in json.dumps([each.as_json() for each in found])


def test_without_a_base_model_the_turns_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, CHAT[1]]}) + "\n")
    [row] = show_rows(
        DataParams(raw=["a.jsonl"]), ValidateParams(), root=tmp_path, count=3, chat=None, supervise="assistant"
    )
    assert row.pieces == [("user: hi\n", False), ("assistant: yes\n", True)]


def test_where_all_tokens_are_learned_all_but_the_first_and_what_follows_the_answer_are_shown_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, CHAT[1]]}) + "\n")
    chat = open_chat(tiny.make_tokenizer())
    [row] = show_rows(DataParams(raw=["a.jsonl"]), ValidateParams(), root=tmp_path, count=3, chat=chat, supervise="all")
    assert row.pieces == [
        ("<|im_start|>", False),
        ("user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", True),
        ("\n", False),
    ]
    assert row.learned == row.tokens - 2


ADDRESS = "192.168.17.4"


@pytest.fixture
def presidio() -> Iterator[Personal]:
    pytest.importorskip("presidio_analyzer", reason="the extra `presidio` is not installed")
    personal._analyst.cache_clear()
    yield Personal(entities=["IP_ADDRESS", "US_SSN"], score=0.4)
    personal._analyst.cache_clear()


def test_what_presidio_finds_is_masked_as_in_the_quarantine_where_it_is_asked_for(
    tmp_path: Path, presidio: Personal
) -> None:
    pair: Any = {"prompt": "which host?", "chosen": f"{ADDRESS} and me@example.com", "rejected": f"not {ADDRESS}"}
    (tmp_path / "a.jsonl").write_text(json.dumps(pair) + "\n")

    def said(params: ValidateParams) -> list[str]:
        data = DataParams(raw=["a.jsonl"], layout="preference")
        found = show_rows(data, params, root=tmp_path, count=3, chat=None, supervise="assistant")
        return ["".join(text for text, _ in each.pieces) for each in found]

    masked = "user: which host?\nassistant: [ip_address] and [email]\n"
    assert said(ValidateParams(personal=presidio)) == [masked, "user: which host?\nassistant: not [ip_address]\n"]
    assert said(ValidateParams())[1] == f"user: which host?\nassistant: not {ADDRESS}\n"


def test_a_masked_call_is_a_call_still_and_roles_that_are_no_roles_are_masked(
    tmp_path: Path, presidio: Personal
) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nabc"  # its mask goes on to the end of the text
    call: Any = {"type": "function", "function": {"name": "ask", "arguments": {"key": key, "host": ADDRESS, "n": 3}}}
    calls = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    odd = [{"role": "user", "content": "hi"}, {"role": ADDRESS, "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"messages": each, "tools": None}) + "\n" for each in (calls, odd))
    )
    params = ValidateParams(personal=presidio)
    data = DataParams(raw=["a.jsonl"], tools="tools")
    found = show_rows(data, params, root=tmp_path, count=3, chat=None, supervise="assistant")
    written = json.loads(found[0].pieces[1][0].removeprefix("assistant: "))
    assert written[0]["function"] == {
        "name": "ask",
        "arguments": {"key": "[secret]", "host": "[ip_address]", "n": 3},
    }
    assert found[1].pieces[1] == ("[ip_address]: ho\n", False)


def test_of_an_over_long_row_presidio_sees_and_the_command_shows_the_beginning(
    tmp_path: Path, presidio: Personal
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "ab " * 20_000}]}) + "\n")
    data = DataParams(raw=["a.jsonl"])
    for params, shown in ((ValidateParams(personal=presidio), 19_000), (ValidateParams(), 60_000)):
        [row] = show_rows(data, params, root=tmp_path, count=1, chat=None, supervise="assistant")
        assert row.reasons == ["over_long", "missing_answer"]
        assert len(row.pieces[0][0]) == len("user: \n") + shown


def test_a_call_nested_as_deep_as_the_parser_goes_is_left_out(tmp_path: Path) -> None:
    deep = "[" * 900 + '"me@example.com"' + "]" * 900
    call = '{"type": "function", "function": {"name": "f", "arguments": {"a": ' + deep + "}}}"
    turns = '{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [' + call + "]}"
    (tmp_path / "a.jsonl").write_text('{"messages": [' + turns + '], "tools": null}\n')
    data = DataParams(raw=["a.jsonl"], tools="tools")
    [row] = show_rows(data, ValidateParams(), root=tmp_path, count=1, chat=None, supervise="assistant")
    assert row.reasons == ["email"]
    assert row.pieces[1] == ("assistant: []\n", True)
