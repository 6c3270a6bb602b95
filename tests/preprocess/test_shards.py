"""Shards by content, their cache, and increments."""

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import read_json, verify_dir
from regraft.preprocess import shards, work
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.shards import Cache, cut

PARAMS = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of some fifty rows."""
    monkeypatch.setattr(shards, "_LEAST", 40)
    monkeypatch.setattr(shards, "_MOST", 90)
    monkeypatch.setattr(shards, "_DIGITS", 1)
    monkeypatch.setattr("regraft.preprocess.work._LITTLE", 10**6)  # in this process


def talk_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(3)
    return [
        {
            "messages": [
                {"role": "user", "content": f"where is order {first + i} " + "please " * dice.randrange(9)},
                {"role": "assistant", "content": f"track {first + i}"},
            ]
        }
        for i in range(count)
    ]


@pytest.mark.usefixtures("small")
def test_shards_hold_every_row_once_and_a_new_row_changes_only_its_own(write_rows: Callable[..., Path]) -> None:
    rows = talk_rows(1000)
    before = list(cut(write_rows(rows, "before") / "rows.parquet"))
    assert [each.first for each in before] == [0, *(each.end for each in before[:-1])]
    assert before[-1].end == 1000
    assert all(40 <= each.rows <= 90 for each in before[:-1])
    after = list(cut(write_rows([*rows, *talk_rows(10, 5000)], "after") / "rows.parquet"))
    changed = {each.digest for each in before} - {each.digest for each in after}
    assert changed <= {before[-1].digest}


@pytest.mark.usefixtures("small")
def test_an_increment_makes_few_shards_and_the_same_bytes_as_a_full_run(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = talk_rows(600)
    more = write_rows([*rows, *talk_rows(6, 900)], "more")
    cache = tmp_path / "cache"
    preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "first", cache=cache)
    with caplog.at_level("INFO"):
        report = preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "second", cache=cache)
    assert "; 1 of " in caplog.text or "; 2 of " in caplog.text
    preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "anew")
    assert (tmp_path / "second/manifest.json").read_bytes() == (tmp_path / "anew/manifest.json").read_bytes()
    verify_dir(tmp_path / "second")
    assert report.counts.rows_in == 606
    assert len(list((tmp_path / "second").glob("train-*.arrow"))) > 5


@pytest.mark.usefixtures("small")
def test_a_damaged_entry_is_found_by_its_digest_and_made_again(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    folder, cache = write_rows(talk_rows(300)), tmp_path / "cache"
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "first", cache=cache)
    whole = (tmp_path / "first/manifest.json").read_bytes()
    shutil.rmtree(tmp_path / "first")
    names = {"train.arrow", "keys.npz"}
    for path in sorted(cache.rglob("*")):
        if path.name in names:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))
            names.remove(path.name)
    assert not names
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "second", cache=cache)
    assert (tmp_path / "second/manifest.json").read_bytes() == whole
    verify_dir(tmp_path / "second")


@pytest.mark.usefixtures("small")
def test_what_is_new_and_what_is_damaged_are_made_in_one_run(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, cache = talk_rows(300), tmp_path / "cache"
    preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows), out=tmp_path / "first", cache=cache)
    shutil.rmtree(tmp_path / "first")  # its files are the cache's, under a second name
    path = next(iter(sorted(cache.rglob("train.arrow"), key=lambda each: -each.stat().st_size)))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))
    more = write_rows([*rows, *talk_rows(120, 5000)], "more")
    with caplog.at_level("INFO"):
        preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "second", cache=cache)
    assert "its sha256 differs" in caplog.text
    preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "anew")
    assert (tmp_path / "second/manifest.json").read_bytes() == (tmp_path / "anew/manifest.json").read_bytes()
    verify_dir(tmp_path / "second")


@pytest.mark.parametrize(
    ("mean", "fewer"), [(600, 1), (1_500, 1), (3_000, 2), (5_000, 4), (50_000, 32), (10**7, 1_024)]
)
def test_the_longer_the_rows_the_fewer_a_shard_has(tmp_path: Path, mean: int, fewer: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    dice = random.Random(1)
    pq.write_table(pa.table({"text": [dice.randbytes(mean).hex()[:mean] for _ in range(20)]}), path)
    assert shards._fewer(path) == fewer
    starts = shards._starts(fewer)
    assert sum(f"{i:03x}".startswith(tuple(starts)) for i in range(4_096)) == fewer
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert shards._fewer(path) == 1


@pytest.mark.usefixtures("small")
def test_an_increment_of_long_rows_makes_few_short_shards_and_the_same_bytes(
    tokenizer_base: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_LONG", 20)  # bytes; these rows have some 100
    rows, cache = talk_rows(600), tmp_path / "cache"
    few, more = write_rows(rows, "few"), write_rows([*rows, *talk_rows(6, 900)], "more")
    cuts = [each.rows for each in cut(few / "rows.parquet")]
    assert len(cuts) > 30
    assert max(cuts) <= 90 // 4
    assert min(cuts[:-1]) >= 40 // 4
    preprocess(PARAMS, base=tokenizer_base, rows=few, out=tmp_path / "first", cache=cache)
    with caplog.at_level("INFO"):
        caplog.clear()
        preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "second", cache=cache)
    made = int(caplog.messages[-1].split(" shards made anew")[0].split("; ")[-1].split(" of ")[0])
    assert 0 < made <= 3
    preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "anew")
    assert (tmp_path / "second/manifest.json").read_bytes() == (tmp_path / "anew/manifest.json").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"at": [None, "b"]},
        {"at": ["a", ""], "source": ["x", "x"]},
        {"row_id": ["12", "3"]},
        {"line": [1, 3]},
        {"source": ["xx", ""]},
        {"at": [None, None]},
        {"at": ["", ""]},
    ],
)
def test_a_shards_digest_tells_any_change_of_a_value(changes: dict[str, list[Any]]) -> None:
    import pyarrow as pa

    schema = pa.schema({"row_id": pa.string(), "source": pa.string(), "line": pa.int64(), "at": pa.string()})
    plain: dict[str, list[Any]] = {"row_id": ["1", "23"], "source": ["x", "x"], "line": [1, 2], "at": ["", "b"]}
    tables = [pa.Table.from_pydict(each, schema) for each in (plain, plain | changes)]
    assert len({shards._digest(each) for each in tables}) == 2
    # How rows came in batches is no change.
    apart = pa.concat_tables([tables[1].slice(0, 1), pa.concat_tables([tables[0], tables[1]]).slice(3, 1)])
    assert shards._digest(apart) == shards._digest(tables[1])


def test_a_shards_digest_tells_where_a_time_is_missing() -> None:
    import pyarrow as pa

    schema = pa.schema({"row_id": pa.string(), "source": pa.string(), "line": pa.int64(), "at": pa.string()})
    rows: dict[str, list[Any]] = {"row_id": ["1", "2"], "source": ["x", "x"], "line": [1, 2]}
    tables = [pa.Table.from_pydict({**rows, "at": at}, schema) for at in (["", None], [None, ""])]
    assert shards._digest(tables[0]) != shards._digest(tables[1])


def test_several_processes_make_the_same_bytes_as_one(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_rows(talk_rows(400))
    for name, value in (("_LEAST", 40), ("_MOST", 90), ("_DIGITS", 1)):
        monkeypatch.setattr(shards, name, value)
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "one")
    monkeypatch.setattr("regraft.preprocess.work._LITTLE", 0)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_entries_that_were_not_used_lately_are_removed(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for i in range(14):
        some = write_rows(talk_rows(60, 1000 * i), f"rows-{i}")
        preprocess(PARAMS, base=tokenizer_base, rows=some, out=tmp_path / "out", cache=cache)
    assert len(list(cache.iterdir())) == 1 + 3 + 18  # the note, the tokenizer, two for one shard, and what is spared


@pytest.mark.usefixtures("small")
def test_an_increment_verifies_each_entry_that_it_takes_over_once(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, verified: list[tuple[str, bool]]
) -> None:
    rows, cache = talk_rows(600), tmp_path / "cache"
    preprocess(PARAMS, base=tokenizer_base, rows=write_rows(rows, "few"), out=tmp_path / "first", cache=cache)
    before = read_json(cache / "last.json")["used"]
    verified.clear()
    more = write_rows([*rows, *talk_rows(6, 900)], "more")
    preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "second", cache=cache)
    [tokenizer] = [name for name in before if (cache / name / "tokenizer.json").exists()]
    again = {*before} & {*read_json(cache / "last.json")["used"]} - {tokenizer}
    assert len(again) > 10
    times = Counter(name for name, _ in verified)
    assert {name: times[name] for name in again} == dict.fromkeys(again, 1)
    assert any(not main for name, main in verified if name in again)


@pytest.mark.usefixtures("small")
def test_no_process_is_forked_while_what_was_noted_is_verified(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    cache, folder = tmp_path / "cache", write_rows(talk_rows(200), "few")
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "first", cache=cache)
    running: list[int] = []
    pool = work.ProcessPoolExecutor

    def watched(*given: Any, **named: Any) -> Any:
        running.append(threading.active_count())
        return pool(*given, **named)

    monkeypatch.setattr(work, "ProcessPoolExecutor", watched)
    monkeypatch.setattr(Cache, "find", lambda _, __: time.sleep(0.2))  # slow, and nothing is whole
    beside = threading.active_count()
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "second", cache=cache)
    assert running == [beside, beside]
