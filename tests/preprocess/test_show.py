"""What `regraft data show` shows."""

import json
from pathlib import Path

import tiny

from regraft.chat import open_chat
from regraft.preprocess.show import show_rows
from regraft.validate.params import DataParams, ValidateParams

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
