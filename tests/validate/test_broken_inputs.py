"""A corpus of broken inputs: each is quarantined or refused with its reason, and no row is unaccounted for."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.errors import GateRefused
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.report import ValidateReport
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
}
FINE: dict[str, bytes] = {  # looks broken, and is not
    "duplicate keys: the last one counts, as in any parser": b'{"messages": 1, ' + LINE.strip()[1:],
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
    assert len(ROWS) + len(FILES) >= 60


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


FILES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "an empty file": ("x.jsonl", lambda _: b""),
    "an empty list": ("x.json", lambda _: b"[]"),
    "JSON that breaks off": ("x.json", lambda _: of([GOOD] * 5)[:-9]),
    "JSON that is a mapping": ("x.json", lambda _: of({"rows": [GOOD]})),
    "a gz that breaks off": ("x.jsonl.gz", lambda _: gzip.compress(LINE * 5_000)[:-30]),
    "a gz that is none": ("x.jsonl.gz", lambda _: LINE),
    "a gz with a wrong checksum": ("x.jsonl.gz", lambda _: gzip.compress(LINE)[:-8] + b"\0" * 8),
    "an empty gz": ("x.jsonl.gz", lambda _: b""),
    "a zst that breaks off": ("x.jsonl.zst", lambda _: bytes(pa.compress(LINE * 50, "zstd", asbytes=True))[:-5]),
    "a parquet that breaks off": ("x.parquet", lambda path: table(path)[:-20]),
    "a parquet that is none": ("x.parquet", lambda _: LINE),
    "an arrow that is none": ("x.arrow", lambda _: LINE),
    "a header alone, of another kind": ("x.xlsx", lambda _: b"PK\3\4"),
    "only broken rows": ("x.jsonl", lambda _: b"{\n[\n"),
    "an archive of other things": ("x.tar.gz", lambda _: gzip.compress(b"tar")),
    "columns twice": ("x.csv", lambda _: b"messages,messages\n1,2\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_named_with_its_problem_or_refused(tmp_path: Path, name: str) -> None:
    file, make = FILES[name]
    (tmp_path / "raw").mkdir()
    content = make(tmp_path / "raw" / file)
    (tmp_path / "raw" / file).write_bytes(content)
    (tmp_path / "raw/good.jsonl").write_bytes(LINE * 3)
    if name == "columns twice":  # it has the column that a conversation is in, with text in it
        assert run(tmp_path).quarantined_by_reason == {"wrong_shape": 1}
    report = run(tmp_path)
    assert report.files[f"raw/{file}"].problem
    assert report.files["raw/good.jsonl"].problem is None
    assert report.rows_in == sum(each.rows for each in report.files.values())
    strict = {"expectations": {"quarantined": {"share": 1.0}}}
    with pytest.raises(GateRefused, match="files: measured 1"):
        run(tmp_path, **strict)


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
    assert all(row["reasons"] for row in kept[1])
