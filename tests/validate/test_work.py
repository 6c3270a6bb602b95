"""Looking at batches in several processes: the same bytes as in one, and an error where one of them is killed."""

import hashlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled import fill, outputs

from regraft.artifacts import canonical_json
from regraft.errors import ParamsError, RegraftError
from regraft.validate import quarantine, work
from regraft.validate import validate as stage_module
from regraft.validate.look import Looker
from regraft.validate.mapping import Row, row_digests
from regraft.validate.patterns import FINDERS, mask
from regraft.validate.quarantine import QUARANTINE, ROWS, ParquetRows, quarantine_table

PARTS = (
    "4111 1111 1111 1111", "4111111111111111", "DE89 3704 0044 0532 0130 00", "+49 30 12345678", "0049 30 12345678", "a@b.cc",
    "@", "sk-" + "a1B2" * 8, "AKIA" + "ABCD" * 4, "ghp_" + "a" * 36, "-----BEGIN PRIVATE KEY-----\nx", "xoxb-" + "1" * 12,
    "eyJ" + "a" * 20 + "." + "b" * 20 + "." + "c" * 20, "hf_" + "x" * 32, "glpat-" + "x" * 20, "github_pat_" + "x" * 41,
    " ", "x", "0", "00", "+", "-", "_", "\u00a0", "\u202f", ".", "\n", "AB12", "\u0661",
)  # fmt: skip


@pytest.mark.parametrize("duplicates", ["keep", "quarantine"])
def test_the_output_has_the_same_bytes_whatever_the_processes_and_the_batches(
    stage: Any, monkeypatch: pytest.MonkeyPatch, duplicates: str
) -> None:
    fill(stage, random.Random(5))
    data = {"id": "id", "time": "at", "slices": ["kind"]}
    params: dict[str, Any] = {
        "duplicates": duplicates,
        "scripts": {"allowed": ["Latin"], "quarantine": True},
        "expectations": {
            "quarantined": {"share": 1.0},
            "files": {"unreadable": 1},
            "slices": {"kind": {"minimum": 1}},
            "reasons": {"email": {"share": 1.0, "level": "warn"}},
        },
    }
    report = stage.run(data, **params)
    assert report.rows_quarantined > 100
    assert report.rows_duplicate > 100
    row_ids = "".join(row["row_id"] + "\n" for row in stage.rows())
    assert report.data_digest == hashlib.sha256(row_ids.encode()).hexdigest()
    assert report.files["data/raw/empty.jsonl"].problem == "not one of its 1 rows can be read"
    expected = outputs(stage.root)
    monkeypatch.setattr(work, "_LITTLE", 0)
    for processes, batch in ((1, 4_096), (2, 64), (3, 37)):
        monkeypatch.setenv("REGRAFT_WORKERS", str(processes))
        monkeypatch.setattr(stage_module, "_BATCH", batch)
        assert stage.run(data, **params) == report
        assert outputs(stage.root) == expected


def test_row_groups_have_one_size_whatever_the_tables(tmp_path: Path) -> None:
    for sizes in ([1, 9_999, 1, 15_000, 0, 4_000], [29_001]):
        numbers = iter(range(30_000))
        with ParquetRows(tmp_path / f"{len(sizes)}.parquet", QUARANTINE) as file:
            for size in sizes:
                row = {"source": "a", "id": None, "raw": "", "reasons": ["email"]}
                file.add(quarantine_table([{**row, "line": next(numbers)} for _ in range(size)]))
            assert file.count == 29_001
    found = pq.ParquetFile(tmp_path / "6.parquet").metadata
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [10_000, 10_000, 9_001]
    assert (tmp_path / "6.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()


def test_row_groups_of_long_rows_end_where_their_bytes_say_whatever_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_GROUP", 10)
    monkeypatch.setattr(quarantine, "_GROUP_BYTES", 100)
    lengths = [5] * 12 + [80, 5, 5, 500, 30, 55, 5, 5, 5, 5]
    rows = [
        {"source": "", "line": i, "id": None, "raw": "x" * (n - 5), "reasons": ["email"]} for i, n in enumerate(lengths)
    ]
    for size in (1, 3, 7, 22):
        with ParquetRows(tmp_path / f"{size}.parquet", QUARANTINE) as file:
            for first in range(0, 22, size):
                file.add(quarantine_table(rows[first : first + size]))
    found = pq.ParquetFile(tmp_path / "22.parquet").metadata
    groups = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
    assert groups == [10, 5, 1, 5, 1]  # ten; 5 + 5 + 80 + 5 + 5; 500; 30 + 55 + 5 + 5 + 5; the rest
    assert len({(tmp_path / f"{size}.parquet").read_bytes() for size in (1, 3, 7, 22)}) == 1


def test_a_rows_bytes_are_those_of_all_its_texts_at_any_depth() -> None:
    row = {"row_id": "ab", "source": "\u00fc", "line": 1, "at": None, "id": "1"}
    talk = [{"role": "user", "content": "four"}, {"role": "x", "content": None}]
    table = pa.Table.from_pylist(
        [{**row, "messages": [], "slices": [("kind", "a")]}, {**row, "messages": talk, "slices": []}] * 3, ROWS
    )
    assert quarantine._sizes(table).tolist() == [10, 14] * 3
    assert quarantine._sizes(table.slice(1, 4)).tolist() == [14, 10, 14, 10]
    assert quarantine._sizes(pa.concat_tables([table.slice(3), table.slice(0, 1)])).tolist() == [14, 10, 14, 10]
    assert quarantine._sizes(table.slice(0, 0)).tolist() == []


def test_long_rows_make_short_batches(stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write("a.jsonl", chat("x" * 3_000) * 4 + chat("hi") * 30)
    found: list[tuple[int, int]] = []
    look = Looker.look

    def looked(self: Looker, name: str, batch: list[Any]) -> Any:
        found.append((len(batch), sum(len(each.raw) for each in batch)))
        return look(self, name, batch)

    monkeypatch.setattr(Looker, "look", looked)
    stage.run()
    assert len(found) == 1
    expected = outputs(stage.root)
    monkeypatch.setattr(stage_module, "_BATCH", 20)
    monkeypatch.setattr(stage_module, "_BATCH_BYTES", 6_500)
    stage.run()
    assert [rows for rows, _ in found[1:]] == [3, 20, 11]
    assert max(size for _, size in found[1:]) < 6_500 + 3_200, "the row that fills a batch is in it"
    assert outputs(stage.root) == expected


def test_a_process_that_is_killed_ends_the_stage_with_an_error_and_leaves_the_old_output(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.write("a.jsonl", chat("hi"))
    stage.run()
    expected = outputs(stage.root)
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    monkeypatch.setattr(Looker, "look", lambda self, name, batch: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RegraftError, match="was killed") as caught:
        stage.run()
    assert "REGRAFT_WORKERS" in (caught.value.fix or "")
    assert outputs(stage.root) == expected


def test_an_error_in_a_process_is_raised_as_it_is(stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write("a.jsonl", chat("hi"))
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    with pytest.raises(ParamsError, match="Klingon") as caught:
        stage.run(scripts={"allowed": ["Klingon"]})
    assert "Latin, Han" in (caught.value.fix or "")


def test_a_little_data_is_read_without_further_processes(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.write("a.jsonl", chat("hi"))
    monkeypatch.setattr(work, "ProcessPoolExecutor", None)
    assert stage.run().rows_out == 1


@pytest.mark.parametrize("rejected", [None, 'no "\u2028'])
@pytest.mark.parametrize("wanted", [None, True, False])
def test_row_ids_are_of_canonical_json(rejected: str | None, wanted: bool | None) -> None:
    messages = [{"role": "user", "content": 'a"\\\n\x7f\u00e9\U0001f600'}, {"role": "tool", "content": "", "name": "x"}]
    row = Row(messages, {"b": "2", "a": "\u2029"}, None, None, rejected=rejected, wanted=wanted)
    content: Any = {"messages": messages, "rejected": rejected, "wanted": wanted} if row.is_preference else messages
    whole = canonical_json({"messages": content, "slices": row.slices})
    assert row_digests(row) == (
        hashlib.sha256(whole).hexdigest()[:32],
        hashlib.sha256(canonical_json(content)).digest()[:16],
    )


def test_the_quick_look_before_masking_misses_nothing_that_the_finders_find() -> None:
    dice = random.Random(1)
    for _ in range(20_000):
        text = "".join(dice.choices(PARTS, k=dice.randrange(1, 7)))
        expected = text
        for kind in ("secret", "iban", "card_number", "phone", "email"):
            for start, stop in reversed(list(FINDERS[kind](expected))):
                expected = f"{expected[:start]}[{kind}]{expected[stop:]}"
        assert mask(text) == expected
