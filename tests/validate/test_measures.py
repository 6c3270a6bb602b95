import json
from typing import Any

import pytest

from regraft.validate.mapping import Mapping
from regraft.validate.measures import measure
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.raw import RawRow


def raw(line: int, text: str, **columns: Any) -> RawRow:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    record = {"messages": messages, **columns}
    return RawRow(line, json.dumps(record).encode(), record=record)


def found(batch: list[RawRow], **params: Any) -> list[set[str]]:
    data = DataParams.model_validate({"id": "id", "slices": ["kind"]})
    _, table = measure(batch, Mapping(data, ValidateParams.model_validate(params)))
    return [{name for name, value in row.items() if value} for row in table.to_pylist()]


TEXTS = {
    "control_characters": "a\x00b",
    "bidi_characters": "a\u202eb",
    "mojibake": "caf\u00c3\u00a9",
    "email": "me@example.com",
    "card_number": "4111 1111 1111 1111",
    "iban": "DE89370400440532013000",
    "phone": "+49 30 12345678",
    "secret": "AKIA" + "ABCD" * 4,
    "over_long": "x" * 101,
}


@pytest.mark.parametrize("reason", TEXTS)
def test_each_kind_of_text_is_measured_in_its_own_row_and_column(reason: str) -> None:
    batch = [raw(1, "fine"), raw(2, TEXTS[reason]), raw(3, "fine")]
    assert found(batch, max_bytes=100) == [set(), {reason}, set()]


@pytest.mark.parametrize(
    "reason",
    ["control_characters", "bidi_characters", "mojibake", "email", "card_number", "iban", "phone", "secret"],
)
def test_a_kind_that_the_parameters_leave_out_is_not_measured(reason: str) -> None:
    assert found([raw(1, TEXTS[reason])], text=[], pii=[]) == [set()]


def test_slices_and_ids_are_looked_at_too_since_they_are_stored() -> None:
    batch = [raw(1, "fine", kind="a@example.com"), raw(2, "fine", id="a@example.com"), raw(3, "fine", kind="a\x00")]
    assert found(batch) == [{"email"}, {"email"}, {"control_characters"}]


def test_a_row_that_could_not_be_read_has_its_readers_reason_only() -> None:
    batch = [RawRow(1, b"{", reason=Reason.NOT_JSON), RawRow(2, b"{}", record={}), raw(3, "half \ud83d")]
    assert found(batch) == [{"not_json"}, {"wrong_shape"}, {"not_utf8"}]


def test_length_is_counted_in_bytes() -> None:
    assert found([raw(1, "é" * 50)], max_bytes=104) == [set()]  # 100 bytes, a line end, and "yes"
    assert found([raw(1, "é" * 50)], max_bytes=103) == [{"over_long"}]
