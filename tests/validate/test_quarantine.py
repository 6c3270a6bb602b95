"""What is kept of a row that is not accepted, and why it is not."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.validate.params import Reason
from regraft.validate.quarantine import QUARANTINE, quarantine_table, quarantined, shown
from regraft.validate.raw import RawRow

CARD = "4111 1111 1111 1111"


def of(text: str) -> RawRow:
    raw = text.encode()
    try:
        return RawRow(1, raw, record=json.loads(text))
    except ValueError:
        return RawRow(1, raw, reason=Reason.NOT_JSON)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "me\\u0040example.com"}',
        '{"a": "\\u00014111 1111 1111 1111"}',
        '{"a": [{"b": "4111111111111111"}]}',
        '{"a": 4111111111111111}',
        '{"me@example.com": 1}',
        '{"a": "me\\u0040example.com"',
        '{"a": "me@example.com',
        '{"a": "4111 1111\\u00201111 1111',
    ],
)
def test_no_escape_hides_personal_data(text: str) -> None:
    kept = shown(of(text))
    assert "example.com" not in kept
    assert "1111" not in kept
    assert ("[email]" in kept) != ("[card_number]" in kept)


def test_bytes_that_are_not_utf8_do_not_hide_a_card_number() -> None:
    kept = shown(RawRow(1, b"\x91" + CARD.encode() + b"\xff", reason=Reason.NOT_UTF8))
    assert kept == "\ufffd[card_number]\ufffd"


def test_what_the_cut_would_divide_is_masked_first() -> None:
    text = json.dumps({"a": "x" * 1985 + " me@example.com"})
    assert shown(of(text)).endswith("x [email]")
    assert "me@" not in shown(of(text))
    many = ("a" * 60 + "@" + "b" * 60 + ".example.com ") * 200
    assert "aaa" not in shown(RawRow(1, many.encode(), reason=Reason.NOT_JSON))


def test_at_most_two_thousand_characters_are_kept() -> None:
    assert len(shown(of(json.dumps({"a": "x" * 100_000})))) == 2000
    assert len(shown(of("x" * 100_000))) == 2000


def test_a_row_nested_as_deep_as_the_parser_goes_is_shown_all_the_same() -> None:
    depth = 900
    text = '{"a": ' + "[" * depth + '"me@example.com"' + "]" * depth + "}"
    assert "[email]" in shown(of(text))


def test_lone_surrogates_are_replaced() -> None:
    assert shown(of('{"a": "\\ud83d"}')) == '{"a": "?"}'


def test_each_reason_has_a_column_of_its_own_in_every_run(stage: Any, chat: Any) -> None:
    stage.write("a.jsonl", chat("one") + "{\n" + chat("mail me@example.com\x00") + chat("one") + chat("two"))
    stage.run(duplicates="quarantine")
    found = stage.quarantine()
    assert [row["reasons"] for row in found] == [["not_json"], ["control_characters", "email"], ["duplicate"]]
    for row in found:
        assert row["reasons"] == [each.value for each in Reason if row[each.value]]
    table = pq.read_table(stage.root / "out/quarantine.parquet")
    assert table.column_names == ["source", "line", "id", "raw", "reasons", *(each.value for each in Reason)]
    assert all(table.schema.field(each.value) == pa.field(each.value, pa.bool_(), nullable=False) for each in Reason)
    stage.write("a.jsonl", chat("one"))
    stage.run()
    assert stage.quarantine() == []
    assert pq.read_schema(stage.root / "out/quarantine.parquet").equals(table.schema)


@pytest.mark.parametrize("reasons", [[], [Reason.EMAIL, "odd"]])
def test_a_row_without_a_reason_that_is_known_is_not_quarantined(reasons: list[Any]) -> None:
    row = quarantined("a", of("{"), None, [Reason.NOT_JSON])
    assert quarantine_table([row, row])["not_json"].to_pylist() == [True, True]
    with pytest.raises(ValueError, match=r"a:2 is quarantined for .*; expected a Reason"):
        quarantine_table([row, {**row, "line": 2, "reasons": reasons}])


def test_no_reason_is_named_like_another_column() -> None:
    assert len(set(QUARANTINE.names)) == len(QUARANTINE.names) == 5 + len(Reason)


def test_the_documented_query_counts_rows_by_file_and_reason(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip("duckdb")
    page = Path(__file__).parents[2] / "docs/data.md"
    [query] = re.findall(r"```sql\n(.*?)```", page.read_text(), flags=re.DOTALL)
    stage.write("a.jsonl", chat("one") + "{\n" + chat("me@example.com") + chat("one") + chat("you@example.com"))
    stage.write("b.jsonl", chat("one") + chat("three") + "{\n")
    stage.run(duplicates="quarantine")
    (stage.root / "data/work").mkdir()
    (stage.root / "data/work/validate").symlink_to(stage.root / "out")
    monkeypatch.chdir(stage.root)
    with duckdb.connect() as connection:
        found = connection.sql(query)
        assert found.columns == ["source", "rows", "email", "not_json"]
        assert found.fetchall() == [("data/raw/a.jsonl", 3, 2, 1), ("data/raw/b.jsonl", 1, 0, 1)]
