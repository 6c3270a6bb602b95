import hashlib
import json
from pathlib import Path

import pytest

from regraft.errors import DataError
from regraft.validate.params import Reason
from regraft.validate.raw import RawRow
from regraft.validate.source import DataFile, Opened, columns_of, find_files, read_rows


def read(path: Path, content: str | bytes, longest: int = 1000) -> tuple[list[RawRow], Opened]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    [file] = find_files([path.name], path.parent)[0]
    opened = Opened()
    return list(read_rows(file, longest, opened)), opened


def reasons(rows: list[RawRow]) -> list[tuple[int, Reason | None]]:
    return [(row.line, row.reason) for row in rows]


def test_every_line_of_a_jsonl_is_a_row_with_a_record_or_a_reason(tmp_path: Path) -> None:
    deep = "[" * 100_000
    lines = [b'{"a": 1}', b"", b"{", b'["a"]', b'{"a": "\xff"}', deep.encode()[:900], b'{"a": ' + b"9" * 5000 + b"}"]
    rows, opened = read(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + b"\n".join(lines))
    assert reasons(rows) == [
        (1, None),
        (2, Reason.EMPTY_ROW),
        (3, Reason.NOT_JSON),
        (4, Reason.NOT_JSON),
        (5, Reason.NOT_UTF8),
        (6, Reason.NOT_JSON),
        (7, Reason.OVER_LONG),
    ]
    assert opened.problem is None


def test_json_nested_deeper_than_the_parser_goes_is_not_json(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.jsonl", "[" * 200_000, longest=300_000)
    assert reasons(rows) == [(1, Reason.NOT_JSON)]


def test_an_endless_line_is_cut_and_the_next_one_read(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.jsonl", b"x" * 5_000_000 + b'\n{"a": 1}\n')
    assert reasons(rows) == [(1, Reason.OVER_LONG), (2, None)]
    assert len(rows[0].raw) <= 1002


def test_a_csv_has_quotes_line_ends_in_fields_and_both_kinds_of_line_end(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.csv", 'text,category\r\n"a, ""b""\nc",x\r\nd,y\n')
    assert [(row.line, row.record) for row in rows] == [
        (2, {"text": 'a, "b"\nc', "category": "x"}),
        (4, {"text": "d", "category": "y"}),
    ]


def test_an_open_quote_costs_its_own_row_and_no_other(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.csv", 't,c\na,1\n"b,2\nc,3\nd,4\n"e",5\nf\n')
    assert reasons(rows) == [
        (2, None),
        (3, Reason.NOT_CSV),
        (4, None),
        (5, None),
        (6, None),
        (7, Reason.NOT_CSV),
    ]
    assert [row.raw for row in rows][1] == b'"b,2'


def test_a_csv_row_that_is_empty_too_long_or_not_utf8_is_kept_with_its_reason(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.csv", b"t,c\n\n" + b"x" * 2000 + b",1\n\xff\xfe,2\nd,4\n")
    assert reasons(rows) == [(2, Reason.EMPTY_ROW), (3, Reason.OVER_LONG), (4, Reason.NOT_UTF8), (5, None)]


def test_a_csv_without_a_header_that_can_be_read_keeps_every_row_as_unreadable(tmp_path: Path) -> None:
    rows, opened = read(tmp_path / "x.csv", b"\xff\xfet\x00\nb,2\n")
    assert reasons(rows) == [(1, Reason.NOT_CSV), (2, Reason.NOT_CSV)]
    assert opened.problem == "its first line cannot be read as the names of columns"


def test_a_tsv_is_read_with_tabs(tmp_path: Path) -> None:
    assert read(tmp_path / "x.tsv", "t\tc\na, b\t1\n")[0][0].record == {"t": "a, b", "c": "1"}


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    rows, opened = read(tmp_path / "x.json", json.dumps([{"a": 1}, 2]))
    assert reasons(rows) == [(1, None), (2, Reason.NOT_JSON)]
    assert opened.problem is None


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.json", "{", "it is not JSON: JSONDecodeError"),
        ("x.json", "{}", "it is not a list of rows but dict"),
        ("x.jsonl", "", "it is empty"),
        ("x.jsonl", "PK\x03\x04\nzip\n", "not one of its 2 rows can be read"),
        ("x.xlsx", "PK", "`.xlsx` is not a known format; known: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
        ("x.csv", "a,b,a\n1,2,3\n", "it has several columns with one name: a"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_says_why(tmp_path: Path, name: str, content: str, problem: str) -> None:
    assert read(tmp_path / name, content)[1].problem == problem


def test_the_digest_is_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    content = b'{"a": 1}\n' * 1000
    assert read(tmp_path / "x.jsonl", content)[1].digest == hashlib.sha256(content).hexdigest()


def test_folders_files_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.csv", "b/.hidden.jsonl", "b/README.md", "b/raw.jsonl.dvc", "b/LICENSE", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    files, ignored = find_files(["b", "b/*.jsonl", "a.json", str(tmp_path / "a.json")], tmp_path)
    assert [file.name for file in files] == ["a.json", "b/1.csv", "b/2.jsonl"]
    assert ignored == ["b/.hidden.jsonl", "b/LICENSE", "b/README.md", "b/raw.jsonl.dvc"]


def test_a_link_into_a_cache_is_followed_and_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text('{"a": 1}\n')
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.jsonl").symlink_to(tmp_path / "cache")
    [file] = find_files(["raw"], tmp_path)[0]
    assert file.name == "raw/x.jsonl"
    assert [row.record for row in read_rows(file, 100, Opened())] == [{"a": 1}]


def test_a_broken_link_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "nothing")
    [file] = find_files(["."], tmp_path)[0]
    with pytest.raises(DataError, match=r"x\.jsonl is not a file"):
        list(read_rows(file, 100, Opened()))


def test_all_entries_that_name_nothing_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(DataError) as failure:
        find_files(["raw", "more/*.csv"], tmp_path)
    assert failure.value.message == "data.raw: `raw` is not there; `more/*.csv` matches nothing"


def test_an_empty_folder_is_an_error_that_says_what_to_put_there(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/.gitkeep").touch()
    with pytest.raises(DataError) as failure:
        find_files(["raw"], tmp_path)
    assert failure.value.message == "there is no data file in raw"
    assert failure.value.fix is not None
    assert failure.value.fix.startswith("put .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow files there")


def test_columns_are_those_of_the_header_or_of_all_rows_until_the_wanted_were_seen(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,category\n")
    (tmp_path / "x.jsonl").write_text('{\n{"a": 1}\n{"b": 1}\n{"c": 1}\n')
    assert columns_of(DataFile(tmp_path / "x.csv", "x.csv", "csv"), {"label"}, 100) == {"text", "category"}
    assert columns_of(DataFile(tmp_path / "x.jsonl", "x.jsonl", "jsonl"), {"b"}, 100) == {"a", "b"}
