from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import digest_json
from regraft.errors import DataError, ParamsError
from regraft.validate.mapping import Mapping, Row, check_columns, row_digests
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.source import find_files

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{}"}]


def make(record: dict[str, Any], data: dict[str, Any] | None = None, **params: Any) -> Row | None:
    return Mapping(DataParams.model_validate(data or {}), ValidateParams.model_validate(params)).row(record)


def reasons(record: dict[str, Any], data: dict[str, Any] | None = None, **params: Any) -> set[str]:
    row = make(record, data, **params)
    assert row is not None
    return {reason.value for reason in row.reasons}


def of_roles(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("user", "assistant"), set()),
        (("system", "user", "assistant"), set()),
        (("user", "assistant", "user", "assistant"), set()),
        (("user",), {"missing_answer"}),
        (("system",), {"missing_answer"}),
        (("user", "assistant", "user"), {"missing_answer"}),
        (("customer", "bot"), {"wrong_roles"}),
        (("assistant", "user"), {"wrong_roles"}),
        (("user", "user", "assistant"), {"wrong_roles"}),
        (("user", "system", "assistant"), {"wrong_roles"}),
        (("User", "assistant"), {"wrong_roles"}),
    ],
)
def test_turns_begin_with_the_user_alternate_and_end_with_the_assistant(
    roles: tuple[str, ...], expected: set[str]
) -> None:
    assert reasons(of_roles(*roles)) == expected


@pytest.mark.parametrize(
    "messages",
    [None, [], "text", [1], [{"role": "user"}], [{"role": "user", "content": None}], [{**CHAT[0], "tool_calls": [1]}]],
)
def test_what_is_no_list_of_role_and_content_makes_no_row(messages: object) -> None:
    assert make({"messages": messages}) is None


def test_a_message_may_have_other_fields_if_they_are_null() -> None:
    row = make({"messages": [CHAT[0], {**CHAT[1], "tool_calls": None}]})
    assert row is not None
    assert row.messages == CHAT


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff\u00a0"])
def test_a_message_that_shows_nothing_is_empty(text: str) -> None:
    assert reasons({"messages": [{"role": "user", "content": text}, CHAT[1]]}) == {"empty_text"}


def answered(answer: str) -> dict[str, Any]:
    return {"messages": [CHAT[0], {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("answer", ['{"action": "a"', '{"action": NaN}', "action", '{"action": "a"} and', "[" * 99_999])
def test_an_answer_that_is_not_strict_json_is_found(answer: str) -> None:
    assert reasons(answered(answer), answers_are_json=True) == {"answer_not_json"}
    assert reasons(answered(answer)) == set()


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"action": "b"}', "b"),
        ("{}", "(none)"),
        ("[]", "(none)"),
        ('{"action": 1}', "(none)"),
        ('{"action": "a"}', None),
    ],
)
def test_a_label_outside_the_set_is_found_and_named(answer: str, label: str | None) -> None:
    labels = {"json_field": "action", "allowed": ["a"]}
    row = make(answered(answer), answers_are_json=True, labels=labels)
    assert row is not None
    assert row.label == label
    assert row.reasons == ({Reason.UNKNOWN_LABEL} if label else set())


def test_without_a_field_the_whole_answer_is_the_label() -> None:
    assert reasons(answered("a"), labels={"allowed": ["a"]}) == set()
    assert reasons(answered("a "), labels={"allowed": ["a"]}) == {"unknown_label"}


def test_half_of_a_surrogate_pair_is_not_utf8() -> None:
    assert reasons(answered("\ud83d")) == {"not_utf8"}


@pytest.mark.parametrize(
    ("found", "at"),
    [
        ("2026-09-01", "2026-09-01"),
        ("2026-09-01T10:00:00", "2026-09-01T10:00:00"),
        ("2026-09-01T10:00:00+02:00", "2026-09-01T08:00:00+00:00"),
        ("", None),
        (None, None),
    ],
)
def test_times_become_iso_8601_in_utc_so_that_they_sort(found: object, at: str | None) -> None:
    row = make({"messages": CHAT, "t": found}, {"time": "t"})
    assert row is not None
    assert (row.at, row.reasons) == (at, set())


@pytest.mark.parametrize("found", ["yesterday", 1756684800, "01.09.2026"])
def test_a_time_that_is_none_is_a_reason(found: object) -> None:
    assert reasons({"messages": CHAT, "t": found}, {"time": "t"}) == {"wrong_time"}


def test_slices_are_templates_and_a_row_without_the_column_is_in_none() -> None:
    data = {"slices": {"month": "{year}-{month}", "kind": "{kind}"}}
    row = make({"messages": CHAT, "year": 2026, "month": "09", "kind": None}, data)
    assert row is not None
    assert row.slices == {"month": "2026-09"}


def test_a_prompt_and_its_answer_are_built_from_columns() -> None:
    data = {"layout": "prompt_answer", "prompt": "Q: {q}", "answer": "{a}", "system": "Be brief."}
    row = make({"q": "why?", "a": 7}, data)
    assert row is not None
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: why?"},
        {"role": "assistant", "content": "7"},
    ]
    assert make({"q": "why?"}, data) is None


def test_a_row_is_known_by_the_digest_of_messages_and_slices_and_a_duplicate_by_its_messages() -> None:
    row = Row(CHAT, {"b": "2", "a": "é"}, None, None)
    same = Row(CHAT, {}, None, "other")
    assert row_digests(row)[0] == digest_json({"messages": CHAT, "slices": {"a": "é", "b": "2"}})[:32]
    assert row_digests(row)[0] != row_digests(same)[0]
    assert row_digests(row)[1] == row_digests(same)[1]


def check(tmp_path: Path, files: dict[str, str], **data: Any) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    params = DataParams.model_validate({"raw": ["."], "layout": "prompt_answer", "answer": "{category}"} | data)
    check_columns(params, find_files(["."], tmp_path)[0], 1000)


def test_a_wrong_column_name_names_the_columns_found_and_the_one_meant(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as failure:
        check(tmp_path, {"a.csv": "text,category\nx,y\n"}, prompt="{txt}", slices=["kind"])
    assert failure.value.message == (
        "data.prompt names the column `txt`, which is in no file; did you mean `text`?\n"
        "  data.slices.kind names the column `kind`, which is in no file\n"
        "  columns found: category, text"
    )


def test_a_column_that_only_some_files_lack_names_these_files(tmp_path: Path) -> None:
    files = {"a.csv": "text,category\n", "b.jsonl": '{"text": "x"}\n', "c.jsonl": "{\n"}
    with pytest.raises(DataError, match=r"b\.jsonl: no column `category`, which `data\.answer` names"):
        check(tmp_path, files, prompt="{text}")


def test_a_first_row_taken_for_a_header_is_not_shown_in_full(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as failure:
        check(tmp_path, {"a.csv": f"my mail is a@example.com,{'long ' * 30}\n"}, prompt="{text}")
    assert "columns found: " + "long " * 8 + ", my mail is [email]" in failure.value.message
