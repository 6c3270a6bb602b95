"""Preferences as other tools write them: what is understood, what is quarantined, and that nothing else changes."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from regraft.errors import DataError, ParamsError
from regraft.validate.preferences import Preferred, preferred

USER, YES, NO = ({"role": "user", "content": "hi"}, *({"role": "assistant", "content": c} for c in ("yes", "no")))
CHAT = Preferred([USER, YES], "no", None)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES], "score_chosen": 8},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"chosen": "hi yes", "rejected": "hi no"},
    ],
    ids=["texts", "turns", "mixed", "conversations", "null prompt", "ultrafeedback", "transcripts", "prefix"],
)
def test_every_form_of_a_pair_is_one_conversation_and_another_answer(record: dict[str, Any]) -> None:
    assert preferred(record) == CHAT


def test_a_prefix_ends_between_words_and_turns_before_it_are_kept() -> None:
    assert preferred({"chosen": "the sky is blue", "rejected": "the sky is black"}) == Preferred(
        [{"role": "user", "content": "the sky is"}, {"role": "assistant", "content": "blue"}], "black", None
    )
    history = [USER, NO, {"role": "user", "content": "really?"}]
    assert preferred({"chosen": [*history, YES], "rejected": [*history, NO]}) == Preferred([*history, YES], "no", None)


@pytest.mark.parametrize(
    ("label", "wanted"), [(True, True), (False, False), (1, True), ("false", False), ("TRUE", True)]
)
def test_a_single_answer_has_a_label(label: Any, wanted: bool) -> None:
    assert preferred({"prompt": "hi", "completion": "yes", "label": label}) == Preferred([USER, YES], None, wanted)
    assert preferred({"completion": [USER, YES], "label": label}) == Preferred([USER, YES], None, wanted)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "yes"},
        {"prompt": "hi", "chosen": "yes", "rejected": None},
        {"prompt": "hi", "chosen": 5, "rejected": "no"},
        {"prompt": {"a": 1}, "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "completion": "yes", "label": "good"},
        {"prompt": "hi", "completion": "yes", "label": 2},
        {"prompt": "hi", "completion": "yes", "label": None},
        {"prompt": "hi", "completion": [], "label": True},
    ],
)
def test_other_rows_are_none(record: dict[str, Any]) -> None:
    assert preferred(record) is None


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_what_breaks_a_pair_is_quarantined_with_its_reason(stage: Any) -> None:
    good = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    broken = [
        ({**good, "rejected": " yes "}, ["same_answers"]),
        ({"chosen": [USER, YES], "rejected": [{"role": "user", "content": "ho"}, NO]}, ["different_prompts"]),
        ({**good, "prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]}, ["different_prompts"]),
        ({"chosen": [USER, YES], "rejected": [USER, USER]}, ["wrong_roles"]),
        ({"chosen": [YES], "rejected": [NO]}, ["wrong_roles"]),
        ({**good, "rejected": " "}, ["empty_text"]),
        ({**good, "rejected": "write to jane@example.org"}, ["email"]),
        ({**good, "rejected": "a\u202eb"}, ["bidi_characters"]),
        ({**good, "rejected": 7}, ["wrong_shape"]),
        ({"prompt": "hi", "completion": "yes", "label": "perhaps"}, ["wrong_shape"]),
    ]
    stage.write("a.jsonl", lines(good, *(row for row, _ in broken)))
    report = stage.run({"layout": "preference"})

    assert report.rows_out == 1
    assert [row["reasons"] for row in stage.quarantine()] == [reasons for _, reasons in broken]
    assert "jane" not in (stage.root / "out/quarantine.parquet").read_bytes().decode("latin-1")
    (row,) = stage.rows()
    assert (row["messages"], row["rejected"], row["wanted"]) == ([USER, YES], "no", None)


def test_only_wanted_answers_must_be_json_and_have_an_allowed_label(stage: Any) -> None:
    own = {"answers_are_json": True, "labels": {"json_field": "a", "allowed": ["x"]}}
    stage.write(
        "a.jsonl",
        lines(
            {"prompt": "1", "chosen": '{"a": "x"}', "rejected": "not json"},
            {"prompt": "2", "chosen": "not json", "rejected": '{"a": "x"}'},
            {"prompt": "3", "completion": "not json", "label": False},
            {"prompt": "4", "completion": '{"a": "y"}', "label": True},
        ),
    )
    stage.run({"layout": "preference"}, **own)

    assert [row["messages"][0]["content"] for row in stage.rows()] == ["1", "3"]
    assert [row["reasons"] for row in stage.quarantine()] == [["answer_not_json"], ["unknown_label"]]


def test_equal_rows_are_duplicates_and_rows_with_another_answer_or_label_are_not(stage: Any) -> None:
    good = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    single = {"prompt": "hi", "completion": "yes", "label": True}
    stage.write("a.jsonl", lines(good, good, {**good, "rejected": "never"}, single, {**single, "label": False}))
    report = stage.run({"layout": "preference"})

    assert (report.rows_out, report.rows_duplicate) == (5, 1)
    assert len({row["row_id"] for row in stage.rows()}) == 4


@pytest.mark.parametrize(
    "content", [{"chosen": "hi yes", "rejected": "hi no"}, {"prompt": "hi", "completion": "yes", "label": True}]
)
def test_auto_tells_preferences_by_their_columns(stage: Any, content: dict[str, Any]) -> None:
    stage.write("a.jsonl", lines(content, {"prompt": "hi", "completion": "plain"}))
    report = stage.run({"layout": "auto"})

    assert report.quarantined_by_reason == {"wrong_shape": 1}
    assert stage.rows()[0]["messages"] == [USER, YES]


def test_auto_refuses_preferences_beside_conversations(stage: Any) -> None:
    stage.write("a.jsonl", lines({"chosen": "hi yes", "rejected": "hi no"}))
    stage.write("b.jsonl", lines({"messages": [USER, YES]}))

    with pytest.raises(DataError, match=r"a\.jsonl: preferences; data/raw/b\.jsonl: conversations"):
        stage.run({"layout": "auto"})


def test_a_text_label_leaves_prompt_and_completion_a_conversation(stage: Any) -> None:
    stage.write("a.jsonl", lines({"prompt": "hi", "completion": "yes", "label": "greeting"}))
    stage.run({"layout": "auto"})

    assert pq.read_schema(stage.root / "out/rows.parquet").names[-1] == "id"


def test_files_without_the_columns_are_named(stage: Any) -> None:
    stage.write("a.jsonl", lines({"prompt": "hi", "answer": "yes"}))

    with pytest.raises(ParamsError, match=r"`preference`, but data/raw/a\.jsonl has no such columns") as raised:
        stage.run({"layout": "preference"})
    assert "columns found: answer, prompt" in str(raised.value)


def test_csv_with_labels_is_read(stage: Any) -> None:
    stage.write("a.csv", "prompt,completion,label\nhi,yes,True\nhi,no,false\n")
    stage.run({"layout": "preference"})

    assert [(row["messages"][1]["content"], row["wanted"]) for row in stage.rows()] == [("yes", True), ("no", False)]


def test_show_shows_both_answers(stage: Any) -> None:
    from regraft.preprocess.show import show_rows
    from regraft.validate.params import DataParams, ValidateParams

    stage.write("a.jsonl", lines({"prompt": "hi", "chosen": "yes", "rejected": "no"}))
    stage.write("b.jsonl", lines({"prompt": "hi", "completion": "yes", "label": False}))
    found = show_rows(
        DataParams(layout="auto"), ValidateParams(), root=Path(stage.root), count=3, chat=None, supervise="assistant"
    )

    assert [(each.layout, each.pieces[-1][0]) for each in found] == [
        ("preference, preferred", "assistant: yes\n"),
        ("preference, rejected", "assistant: no\n"),
        ("preference, not wanted", "assistant: yes\n"),
    ]
