"""Compressed and columnar files give the rows that plain ones give, and say so where they are damaged."""

import gzip
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft.validate.raw import RawRow
from regraft.validate.source import Opened, columns_of, find_files, read_rows

ROWS = [{"text": f"row {i} caf\u00e9", "label": "a" if i % 2 else "b"} for i in range(3000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path) -> tuple[list[RawRow], Opened]:
    opened = Opened()
    [file] = find_files([path.name], path.parent)[0]
    return list(read_rows(file, 10_000, opened)), opened


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


def table(path: Path) -> bytes:
    arrow = pa.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pq.write_table(arrow, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as writer:
            writer.write_table(arrow)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.arrow", "x.json.gz", "x.csv.zst"])
def test_every_way_to_store_them_gives_the_same_rows_and_the_digest_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    plain = LINES
    if ".json." in name:
        plain = json.dumps(ROWS).encode()
    if ".csv." in name:
        plain = ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain))
    elif name.endswith(".zst"):
        path.write_bytes(zstd(plain))
    else:
        table(path)
    rows, opened = read(path)
    assert [row.record for row in rows] == ROWS
    assert opened.problem is None
    assert opened.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert columns_of(find_files([name], tmp_path)[0][0], {"text", "label"}, 100) == {"text", "label"}


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_archive_is_a_problem_and_not_a_short_file(tmp_path: Path, name: str, damage: str) -> None:
    whole = gzip.compress(LINES) if name.endswith("gz") else zstd(LINES)
    middle = len(whole) // 2
    content = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        "other": b"this is no archive",
    }[damage]
    (tmp_path / name).write_bytes(content)
    rows, opened = read(tmp_path / name)
    if opened.problem is None:  # zstd without a checksum: the flipped byte is in a row
        assert damage == "flipped"
        assert [row.record for row in rows] != ROWS
    else:
        assert "compression is damaged or cut off" in opened.problem


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_damaged_table_says_after_how_many_rows(tmp_path: Path, name: str) -> None:
    whole = table(tmp_path / name)
    for content in (whole[: len(whole) // 2], b"PAR1 nothing PAR1", b""):
        (tmp_path / name).write_bytes(content)
        _, opened = read(tmp_path / name)
        assert opened.problem is not None
        assert "rows: it is not" in opened.problem


def test_values_that_json_has_not_become_text(tmp_path: Path) -> None:
    import decimal

    row: dict[str, Any] = {
        "at": datetime(2026, 9, 1, 10, tzinfo=UTC),
        "amount": decimal.Decimal("1.50"),
        "raw": b"abc",
        "deep": [{"x": [1, None, 2], "y": True}],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    [read_row], _ = read(tmp_path / "x.parquet")
    assert read_row.record == {
        "at": "2026-09-01T10:00:00+00:00",
        "amount": "1.50",
        "raw": "abc",
        "deep": [{"x": [1, None, 2], "y": True}],
    }
