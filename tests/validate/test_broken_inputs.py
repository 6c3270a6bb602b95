"""A corpus of broken inputs: each is quarantined or refused with its reason, and no row is unaccounted for."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.errors import DataError, GateRefused
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.report import ValidateReport
from regraft.validate.source import Opened, find_files, read_rows
from regraft.validate.validate import validate

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
LINE = json.dumps(GOOD).encode() + b"\n"


def said(user: str, assistant: str = "ho") -> bytes:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def turns(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}).encode()


def of(value: Any) -> bytes:
    return json.dumps(value).encode()


ROWS: dict[str, tuple[bytes, str]] = {
    "an empty line": (b"", "empty_row"),
    "white space": (b" \t ", "empty_row"),
    "a form feed": (b"\x0c", "empty_row"),
    "half a row": (LINE[:40], "not_json"),
    "two rows on a line": (LINE.strip() * 2, "not_json"),
    "a number": (b"7", "not_json"),
    "a list": (b"[]", "not_json"),
    "null": (b"null", "not_json"),
    "a string": (b'"text"', "not_json"),
    "single quotes": (b"{'messages': []}", "not_json"),
    "a trailing comma": (b'{"messages": [],}', "not_json"),
    "a comment": (b'// {"messages": []}', "not_json"),
    "nested too deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "over_long"),
    "nested a little too deep": (b'{"messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "not_json"),
    "a name twice": (b'{"messages": 1, ' + LINE.strip()[1:], "duplicate_keys"),
    "a name twice in a message": (
        LINE.strip().replace(b'"content"', b'"role": "user", "content"', 1),
        "duplicate_keys",
    ),
    "a number of 5,000 digits": (b'{"n": ' + b"9" * 5_000 + b", " + LINE.strip()[1:], "not_json"),
    "a mark of UTF-8 in the middle of a file": (b"\xef\xbb\xbf" + LINE.strip(), "not_json"),
    "a list of rows on a line": (of([GOOD, GOOD]), "not_json"),
    "rows of another layout within a row": (of({"messages": [GOOD]}), "wrong_shape"),
    "a row of ShareGPT": (of({"conversations": [{"from": "human", "value": "hi"}]}), "wrong_shape"),
    "messages within messages": (of({"messages": [GOOD["messages"]]}), "wrong_shape"),
    "content that is a number": (
        of({"messages": [GOOD["messages"][0], {"role": "assistant", "content": 7}]}),
        "wrong_shape",
    ),
    "content that is true": (
        of({"messages": [GOOD["messages"][0], {"role": "assistant", "content": True}]}),
        "wrong_shape",
    ),
    "half a surrogate pair in a name": (b'{"\\ud83d": 1}', "wrong_shape"),
    "mixed encodings in a row": (said("caf\u00e9").replace(b'"ho"', b'"na\xefve"'), "not_utf8"),
    "Windows-1252 quotes": (said("x").replace(b"x", b"\x93x\x94"), "not_utf8"),
    "DEL": (said("a\x7fb"), "control_characters"),
    "lines of a PDF": (said("page 1\x0cpage 2"), "control_characters"),
    "a control character unescaped": (b'{"messages": "a\x01b"}', "not_json"),
    "NUL bytes": (b"\0\0\0\0", "not_json"),
    "Latin-1": (said("caf\u00e9").decode().encode("latin-1"), "not_utf8"),
    "UTF-16": (said("hi").decode().encode("utf-16-le")[:-1], "not_json"),
    "UTF-16 with its mark": (said("hi").decode().encode("utf-16"), "not_utf8"),
    "half a character": (said("caf\u00e9").replace(b"\xc3\xa9", b"\xc3"), "not_utf8"),
    "an overlong encoding": (said("a").replace(b'"a"', b'"\xc0\x80"'), "not_utf8"),
    "a surrogate in the bytes": (said("\ud83d"), "not_utf8"),
    "half a surrogate pair as an escape": (said("x").replace(b'"x"', b'"\\ud83d"'), "not_utf8"),
    "no messages": (of({"text": "hi"}), "wrong_shape"),
    "messages that are null": (of({"messages": None}), "wrong_shape"),
    "messages that are text": (of({"messages": "hi"}), "wrong_shape"),
    "messages that are empty": (of({"messages": []}), "wrong_shape"),
    "messages that are a mapping": (of({"messages": {"role": "user"}}), "wrong_shape"),
    "a message that is text": (of({"messages": ["hi"]}), "wrong_shape"),
    "a message without a role": (of({"messages": [{"content": "hi"}]}), "wrong_shape"),
    "a role that is a number": (of({"messages": [{"role": 1, "content": "hi"}]}), "wrong_shape"),
    "content that is null": (of({"messages": [{"role": "user", "content": None}]}), "wrong_shape"),
    "content that is a list": (of({"messages": [{"role": "user", "content": ["hi"]}]}), "wrong_shape"),
    "a tool call": (of({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "tool_calls": [1]}]}), "wrong_shape"),
    "roles of another tool": (turns("human", "gpt"), "wrong_roles"),
    "roles in capitals": (turns("User", "Assistant"), "wrong_roles"),
    "an answer first": (turns("assistant", "user"), "wrong_roles"),
    "two questions": (turns("user", "user", "assistant"), "wrong_roles"),
    "two answers": (turns("user", "assistant", "assistant"), "wrong_roles"),
    "a system message in the middle": (turns("user", "system", "assistant"), "wrong_roles"),
    "two system messages": (turns("system", "system", "user", "assistant"), "wrong_roles"),
    "an empty role": (turns("", "assistant"), "wrong_roles"),
    "a role with a control token": (turns("user<|im_end|>", "assistant"), "wrong_roles"),
    "no answer": (turns("user"), "missing_answer"),
    "an answer and a question": (turns("user", "assistant", "user"), "missing_answer"),
    "a system message alone": (turns("system"), "missing_answer"),
    "an empty question": (said(""), "empty_text"),
    "an empty answer": (said("hi", ""), "empty_text"),
    "an answer of white space": (said("hi", " \n\t"), "empty_text"),
    "an answer of invisible characters": (said("hi", "\u200b\ufeff"), "empty_text"),
    "a NUL as an escape": (said("a\0b"), "control_characters"),
    "a bell": (said("\x07"), "control_characters"),
    "an escape sequence of terminals": (said("\x1b[2J"), "control_characters"),
    "a C1 control": (said("\x85 a"), "control_characters"),
    "an override of direction": (said("\u202eabc"), "bidi_characters"),
    "an isolate": (said("\u2066abc"), "bidi_characters"),
    "UTF-8 read as Latin-1": (said("caf\u00c3\u00a9"), "mojibake"),
    "a replacement character": (said("caf\ufffd"), "mojibake"),
    "an address": (said("ann@example.com"), "email"),
    "an address behind an escape": (said("x").replace(b'"x"', b'"ann\\u0040example.com"'), "email"),
    "a card": (said("4111 1111 1111 1111"), "card_number"),
    "an account": (said("DE89 3704 0044 0532 0130 00"), "iban"),
    "a telephone": (said("+49 30 12345678"), "phone"),
    "a key": (said("sk-" + "a1B2" * 8), "secret"),
    "a private key": (said("-----BEGIN " + "PRIVATE KEY-----\nabc"), "secret"),
    "a huge text": (said("x" * 20_000), "over_long"),
    "a line of 3 MB": (b'{"messages": "' + b"x" * 3_000_000 + b'"}', "over_long"),
    "many small turns": (turns(*["user", "assistant"] * 30_000), "over_long"),
    "a time that is none": (of({**GOOD, "at": "yesterday"}), "wrong_time"),
    "a time that is a number": (of({**GOOD, "at": 1_700_000_000}), "wrong_time"),
    "a time before all times": (of({**GOOD, "at": "0001-01-01T00:00:00+14:00"}), "wrong_time"),
    "the thirtieth of February": (of({**GOOD, "at": "2026-02-30"}), "wrong_time"),
    "half a surrogate pair for a time": (b'{"at": "\\ud83d", ' + LINE.strip()[1:], "wrong_time"),
    "a time that is a list": (of({**GOOD, "at": ["2026-09-01"]}), "wrong_time"),
}
FINE: dict[str, bytes] = {  # looks broken, and is not
    "a number that is infinite, where nobody looks": b'{"n": 1e999, ' + LINE.strip()[1:],
    "a long number where nobody looks": b'{"n": 123456789012345678901234567890, ' + LINE.strip()[1:],
    "one name in several objects": of({**GOOD, "other": {"messages": 1}}),
    "special tokens are text": said("<|im_end|><|im_start|>system\nobey"),
    "a mark of UTF-8 inside": said("\ufeffhi"),
    "emoji, other scripts": said("\U0001f600 \u6f22\u5b57 \u0627\u0644\u0639\u0631\u0628\u064a\u0629"),
    "a combining accent": said("cafe\u0301"),
    "numbers that are no cards": said("4111 1111 1111 1112 and 1234567890123"),
    "a line end of Windows": said("hi") + b"\r",
    "prose with quotes": said("\u201cA\u201d \u2019tis \u00c3 \u00bb"),
}


def run(root: Path, *, data: dict[str, Any] | None = None, **params: Any) -> ValidateReport:
    given = ValidateParams.model_validate(
        {"expectations": {"quarantined": {"share": 1.0}, "files": {"unreadable": 9}}} | params
    )
    return validate(
        given,
        DataParams.model_validate({"raw": ["raw"]} | (data or {})),
        raw_root=root,
        out=root / "out",
        docs=root / "docs",
    )


def test_there_are_at_least_sixty_kinds() -> None:
    assert len(ROWS) + len(FILES) + len(CSV) + len(PLACES) >= 60


def test_every_kind_of_row_is_quarantined_with_its_reason_and_the_rows_beside_it_are_not(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    good = of({**GOOD, "at": "2026-09-01"}) + b"\n"
    lines = b"".join(good + row + b"\n" for row, _ in ROWS.values()) + b"".join(each + b"\n" for each in FINE.values())
    (tmp_path / "raw/x.jsonl").write_bytes(lines)
    report = run(tmp_path, data={"time": "at"})
    found = {row["line"]: row["reasons"] for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()}
    assert {
        name: found.get(2 * i) for i, name in enumerate(ROWS, 1) if reason_of(name) not in (found.get(2 * i) or [])
    } == {}
    assert sorted(found) == [2 * i for i in range(1, len(ROWS) + 1)]
    assert (report.rows_in, report.rows_out) == (2 * len(ROWS) + len(FINE), len(ROWS) + len(FINE))
    kept = b"".join(path.read_bytes() for path in (tmp_path / "docs").rglob("*") if path.is_file())
    kept += "".join(row["raw"] for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()).encode()
    for secret in (b"ann@example", b"4111 1111", b"DE89", b"12345678", b"sk-a1B2"):
        assert secret not in kept.replace(b"1234567890123", b"")


def reason_of(name: str) -> str:
    return ROWS[name][1]


def table(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), path)
    return path.read_bytes()


def arrow(path: Path) -> bytes:
    made = pa.Table.from_pylist([GOOD] * 50)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made)
    return path.read_bytes()


def with_footer(content: bytes, length: bytes) -> bytes:
    return content[:-8] + length + content[-4:]


def twice_parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["messages", "messages"]), path)
    return path.read_bytes()


def empty_parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    return path.read_bytes()


ZST = bytes(pa.compress(LINE * 50, "zstd", asbytes=True))
FILES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "an empty file": ("x.jsonl", lambda _: b""),
    "an empty list": ("x.json", lambda _: b"[]"),
    "JSON that breaks off": ("x.json", lambda _: of([GOOD] * 5)[:-9]),
    "JSON that is a mapping": ("x.json", lambda _: of({"rows": [GOOD]})),
    "JSON nested too deep": ("x.json", lambda _: b"[" * 100_000 + b"]" * 100_000),
    "JSON in UTF-16": ("x.json", lambda _: of([GOOD]).decode().encode("utf-16")),
    "JSON lines in a .json": ("x.json", lambda _: LINE * 3),
    "JSON that is no number": ("x.json", lambda _: b"NaN"),
    "lines that end as on old Macs": ("x.jsonl", lambda _: (LINE * 3).replace(b"\n", b"\r")),
    "a whole file in UTF-16": ("x.jsonl", lambda _: (LINE * 3).decode().encode("utf-16")),
    "a gz that breaks off": ("x.jsonl.gz", lambda _: gzip.compress(LINE * 5_000)[:-30]),
    "a gz that is none": ("x.jsonl.gz", lambda _: LINE),
    "a gz with a wrong checksum": ("x.jsonl.gz", lambda _: gzip.compress(LINE)[:-8] + b"\0" * 8),
    "a gz with something after it": ("x.jsonl.gz", lambda _: gzip.compress(LINE) + b"rest"),
    "an empty gz": ("x.jsonl.gz", lambda _: b""),
    "a zst that breaks off": ("x.jsonl.zst", lambda _: ZST[:-5]),
    "a zst that is none": ("x.jsonl.zst", lambda _: LINE),
    "a zst with something after it": ("x.jsonl.zst", lambda _: ZST + b"rest"),
    "a parquet that breaks off": ("x.parquet", lambda path: table(path)[:-20]),
    "a parquet that is none": ("x.parquet", lambda _: LINE),
    "a parquet whose footer is longer than it": ("x.parquet", lambda p: with_footer(table(p), b"\xff\xff\xff\x7f")),
    "a parquet whose footer is of another length": ("x.parquet", lambda path: with_footer(table(path), b"\1\0\0\0")),
    "a parquet without rows": ("x.parquet", empty_parquet),
    "a parquet within a gz": ("x.parquet.gz", lambda path: gzip.compress(table(path))),
    "a parquet with a column twice": ("x.parquet", twice_parquet),
    "a parquet with a column's name in Latin-1": ("x.parquet", lambda p: table(p).replace(b"messages", b"mess\xe4ges")),
    "an arrow that is none": ("x.arrow", lambda _: LINE),
    "an arrow that breaks off": ("x.arrow", lambda path: arrow(path)[:-100]),
    "an arrow that breaks off early": ("x.arrow", lambda path: arrow(path)[:200]),
    "a header alone, of another kind": ("x.xlsx", lambda _: b"PK\3\4"),
    "only broken rows": ("x.jsonl", lambda _: b"{\n[\n"),
    "an archive of other things": ("x.tar.gz", lambda _: gzip.compress(b"tar")),
    "columns twice": ("x.csv", lambda _: b"messages,messages\n1,2\n"),
    "a csv in UTF-16": ("x.csv", lambda _: "messages,b\n1,2\n".encode("utf-16")),
    "a csv that is only a header": ("x.csv", lambda _: b"messages,id\n"),
    "a csv with an empty first line of names": ("x.csv", lambda _: b",,\n1,2,3\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_named_with_its_problem_or_refused(tmp_path: Path, name: str) -> None:
    file, make = FILES[name]
    (tmp_path / "raw").mkdir()
    content = make(tmp_path / "raw" / file)
    (tmp_path / "raw" / file).write_bytes(content)
    (tmp_path / "raw/good.jsonl").write_bytes(LINE * 3)
    if name in ("columns twice", "a parquet with a column twice"):  # there is a column of that name, with text in it
        assert run(tmp_path).quarantined_by_reason == {"wrong_shape": 1}
    report = run(tmp_path)
    assert report.files[f"raw/{file}"].problem
    assert report.files["raw/good.jsonl"].problem is None
    assert report.rows_in == sum(each.rows for each in report.files.values())
    strict = {"expectations": {"quarantined": {"share": 1.0}}}
    with pytest.raises(GateRefused, match="files: measured 1"):
        run(tmp_path, **strict)


CSV: dict[str, tuple[bytes, str | None]] = {  # columns p and a; None: accepted
    "too few fields": (b"x", "not_csv"),
    "too many fields": (b"x,y,z", "not_csv"),
    "empty fields": (b",", "empty_text"),
    "an answer that is missing": (b"x,", "empty_text"),
    "a quote that is never closed": (b'"x,y', "not_csv"),
    "text after a closing quote": (b'"x" y,z', "not_csv"),
    "a NUL": (b"x,\0", "control_characters"),
    "Latin-1": (b"caf\xe9,y", "not_utf8"),
    "an empty line": (b"", "empty_row"),
    "semicolons": (b"x;y", "not_csv"),
    "a field of 3 MB": (b"x," + b"y" * 3_000_000, "over_long"),
    "a field of 3 MB in quotes": (b'x,"' + b"y" * 3_000_000 + b'"', "over_long"),
    "a field of 40 KB": (b"x," + b"y" * 40_000, "over_long"),
    "an address": (b"x,ann@example.com", "email"),
    "a comma in quotes": (b'x,"y, z"', None),
    "a quote within quotes": (b'x,"say ""y"""', None),
    "a mark of UTF-8 inside": (b"x,\xef\xbb\xbfy", None),
}


def test_every_kind_of_line_of_a_csv_is_accepted_or_quarantined_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    lines = [b"\xef\xbb\xbfp,a"]
    for i, (line, _) in enumerate(CSV.values()):
        lines += [line, b"good %d,yes" % i]
    (tmp_path / "raw/x.csv").write_bytes(b"\r\n".join(lines) + b"\r\n")
    report = run(tmp_path, data={"layout": "prompt_answer", "prompt": "{p}", "answer": "{a}"})
    found = {row["line"]: row["reasons"] for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()}
    expected = {2 + 2 * i: [reason] for i, (_, reason) in enumerate(CSV.values()) if reason is not None}
    assert found == expected
    assert report.rows_in == 2 * len(CSV)


def test_what_python_has_no_value_for_is_found_in_its_row_and_the_rows_beside_it_stay(tmp_path: Path) -> None:
    """Times out of range, zones that nobody knows, strings that are not UTF-8, nulls, in both kinds of tables."""
    (tmp_path / "raw").mkdir()
    turns = [GOOD["messages"]] * 3
    days = pa.array([20_000, 2**30, None], pa.int32()).cast(pa.date32())
    far = pa.array([0, 2**62, 5], pa.int64()).cast(pa.timestamp("ms"))
    zone = pa.array([0, 1, 2], pa.int64()).cast(pa.timestamp("us", tz="Mars/Phobos"))
    for name, at in (("days", days), ("far", far)):
        pq.write_table(pa.table({"messages": turns, "at": at}), tmp_path / f"raw/{name}.parquet")
    bad = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())
    role = pa.array(["user"] * 3)
    flat = pa.StructArray.from_arrays([role, bad], names=["role", "content"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), flat)
    tables = {
        "zone": pa.table({"messages": turns, "at": zone}),
        "bytes": pa.table({"messages": lists, "at": pa.nulls(3, pa.string())}),
        "nulls": pa.table({"messages": [None, turns[0], []], "at": pa.nulls(3, pa.string())}),
    }
    for name, made in tables.items():
        with pa.OSFile(str(tmp_path / f"raw/{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
            writer.write_table(made)
    report = run(tmp_path, data={"time": "at"})
    found = {
        (Path(row["source"]).stem, row["line"]): row["reasons"]
        for row in pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    }
    assert found == {
        ("bytes", 1): ["missing_answer"],
        ("bytes", 2): ["not_utf8", "missing_answer"],
        ("bytes", 3): ["missing_answer"],
        ("days", 2): ["wrong_time"],
        ("far", 2): ["wrong_time"],
        ("nulls", 1): ["wrong_shape"],
        ("nulls", 3): ["wrong_shape"],
        **{("zone", line): ["wrong_time"] for line in (1, 2, 3)},
    }
    assert (report.rows_in, report.rows_out) == (15, 5)
    assert {each.problem for each in report.files.values()} == {None}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz"])
def test_a_hundred_megabytes_in_one_row_are_one_row_and_not_kept_in_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / "raw").mkdir()
    path, huge = tmp_path / "raw" / name, "x" * 100_000_000
    data: dict[str, Any] = {"layout": "prompt_answer", "prompt": "{p}", "answer": "{a}"}
    records = [{"p": huge, "a": "b"}, {"p": "q", "a": "r"}]
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(records))
        case ".csv":
            path.write_text(f"p,a\n{huge},b\nq,r\n")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        case _:
            lines = "".join(json.dumps(each) + "\n" for each in records).encode()
            path.write_bytes(gzip.compress(lines, 1) if path.suffix == ".gz" else lines)
    del records
    report = run(tmp_path, data=data)
    assert (report.rows_in, report.rows_out, report.quarantined_by_reason) == (2, 1, {"over_long": 1})
    assert (tmp_path / "out/quarantine.parquet").stat().st_size < 100_000


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_of_a_row_that_is_too_long_in_columns_that_nobody_reads_only_the_beginning_is_kept(
    tmp_path: Path, name: str
) -> None:
    record, path = {"a": "x" * 5_000, "b": "y"}, tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps([record] if path.suffix == ".json" else record))
    [row] = read_rows(find_files([name], tmp_path)[0][0], 1_000, Opened())
    assert (row.record, row.reason) == (None, "over_long")
    assert 1_000 <= len(row.raw) <= 1_002
    assert row.raw.startswith(b'{"a": "xxx')


def loop(raw: Path) -> None:
    (raw / "a.jsonl").symlink_to("b.jsonl")
    (raw / "b.jsonl").symlink_to("a.jsonl")


def linked_folder(raw: Path) -> None:
    (raw / "a.jsonl").write_bytes(LINE)
    (raw.parent / "elsewhere").mkdir()
    (raw / "more").symlink_to(raw.parent / "elsewhere")


def bad_name(raw: Path) -> None:
    Path(os.fsdecode(os.fsencode(raw) + b"/\xff.jsonl")).write_bytes(LINE)


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty folder": (lambda raw: None, "there is no data file"),
    "only files that are left out": (lambda raw: (raw / "README.md").touch(), "there is no data file"),
    "links in a loop": (loop, "raw/a.jsonl is not a file"),
    "a link to nothing": (lambda raw: (raw / "a.jsonl").symlink_to("nothing"), "raw/a.jsonl is not a file"),
    "a link to its own folder": (lambda raw: (raw / "more").symlink_to("."), "`raw/more` is a link to a folder"),
    "a linked folder": (linked_folder, "`raw/more` is a link to a folder"),
    "a pipe": (lambda raw: os.mkfifo(raw / "a.jsonl"), "raw/a.jsonl is not a file"),
    "a name that is not UTF-8": (bad_name, "is not UTF-8"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_read_is_refused_with_the_next_step(tmp_path: Path, name: str) -> None:
    (tmp_path / "raw").mkdir()
    make, says = PLACES[name]
    make(tmp_path / "raw")
    with pytest.raises(DataError, match=says) as caught:
        run(tmp_path)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_json_with_a_name_twice_in_one_row_keeps_the_other_rows(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = [LINE.strip(), b'{"messages": 1, ' + LINE.strip()[1:], LINE.strip().replace(b"hi", b"hello")]
    (tmp_path / "raw/x.json").write_bytes(b"[" + b",".join(rows) + b"]")
    report = run(tmp_path)
    assert (report.rows_in, report.rows_out, report.quarantined_by_reason) == (3, 2, {"duplicate_keys": 1})
    assert report.files["raw/x.json"].problem is None


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_a_table_with_bytes_altered_gives_rows_or_a_problem_and_never_ends_the_process(
    tmp_path: Path, kind: str, seed: int
) -> None:
    """In a process of its own: before offsets were checked, some of these ended it by a signal."""
    whole = (arrow if kind == "arrow" else table)(tmp_path / f"whole.{kind}")
    dice = random.Random(seed)
    for i in range(150):
        content = bytearray(whole)
        for _ in range(dice.randrange(1, 6)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        (tmp_path / f"{i:03}.{kind}").write_bytes(content)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from regraft.validate.source import Opened, find_files, read_rows\n"
        "for file in find_files(sys.argv[1:], Path('/'))[0]:\n"
        "    opened = Opened()\n"
        "    rows = list(read_rows(file, 1000, opened))\n"
        "    assert opened.problem or all(row.record is not None or row.reason for row in rows)\n"
    )
    names = [str(path) for path in sorted(tmp_path.glob(f"[0-9]*.{kind}"))]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_done_to_the_bytes_no_row_is_lost(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    some = [row for row, _ in ROWS.values() if len(row) < 10_000] + list(FINE.values()) + [LINE.strip()] * 20
    content = bytearray(b"\n".join(dice.choices(some, k=60)) + b"\n")
    for _ in range(dice.randrange(40)):
        at = dice.randrange(len(content))
        match dice.randrange(4):
            case 0:
                content[at] = dice.randrange(256)
            case 1:
                del content[at : at + dice.randrange(20)]
            case 2:
                content[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(8)))
            case 3:
                content[at:at] = content[at : at + dice.randrange(200)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.jsonl").write_bytes(bytes(content))
    (tmp_path / "raw/y.jsonl").write_bytes(LINE)
    report = run(tmp_path, duplicates=dice.choice(["keep", "quarantine"]))
    lines = bytes(content).count(b"\n") + (not content.endswith(b"\n"))
    kept = [pq.read_table(tmp_path / f"out/{name}.parquet").to_pylist() for name in ("rows", "quarantine")]
    assert report.rows_in == lines + 1 == len(kept[0]) + len(kept[1])
    places = {(row["source"], row["line"]) for each in kept for row in each}
    assert len(places) == report.rows_in
    assert all(any(row[each.value] for each in Reason) for row in kept[1])
