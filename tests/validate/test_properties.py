"""Properties of `validate` and of the whole accounting, on rows that are broken at random (hypothesis)."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.validate.forgotten import Forgotten
from regraft.validate.look import Looker
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.quarantine import PREFERENCES, QUARANTINE, ROWS, TOOL_ROWS, ParquetRows
from regraft.validate.source import Opened, find_files, read_rows
from regraft.validate.sources import mappings
from regraft.validate.validate import _read_file, _Tally
from regraft.validate.work import Lookers

TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\u200b", "someone@example.com", "4111 1111 1111 1111", "<|im_end|>", "Ã©", "\u202ex", "\ud83d", "\0"]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CALL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": TEXT, "arguments": JSON | st.just('{"a": 1}')}),
    },
    optional={"id": st.just("c1") | JSON},
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "text", "human", ""]) | JSON,
        "content": TEXT | JSON,
    },
    optional={"tool_calls": st.lists(CALL, max_size=2) | JSON, "tool_call_id": st.just("c1") | JSON, "name": JSON},
)
TALK = st.tuples(TEXT, TEXT).map(
    lambda said: [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
)
RECORD = st.one_of(
    st.fixed_dictionaries({"messages": TALK, "text": TEXT, "prompt": TEXT}),
    st.fixed_dictionaries(
        {},
        optional={
            "messages": st.lists(MESSAGE, max_size=5) | JSON,
            "conversations": st.lists(st.fixed_dictionaries({"from": TEXT, "value": TEXT}), max_size=3) | JSON,
            "instruction": TEXT | JSON, "output": TEXT | JSON, "input": JSON, "prompt": TEXT | JSON, "completion": TEXT | JSON,
            "text": TEXT | JSON, "tools": st.lists(JSON, max_size=2) | JSON, "id": TEXT | JSON, "at": TEXT | JSON,
            "kind": JSON, "chosen": TEXT | JSON, "rejected": TEXT | JSON, "label": st.booleans() | JSON,
        },
    ),
    JSON,
)  # fmt: skip
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def as_line(record: Any) -> bytes:
    return json.dumps(record).encode()


LINE = st.one_of(
    RECORD.map(as_line),
    st.just(as_line(GOOD)),
    st.binary(max_size=60).filter(lambda raw: b"\n" not in raw and b"\r" not in raw),
    st.tuples(RECORD.map(as_line), st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]]),  # cut off
    st.tuples(RECORD.map(as_line), st.integers(0, 200), st.integers(0, 255)).map(
        lambda three: (
            (three[0][: three[1]] + bytes([three[2]]) + three[0][three[1] + 1 :])
            .replace(b"\n", b" ")
            .replace(b"\r", b" ")
        )
    ),  # one byte is another
)
LAYOUTS: list[dict[str, Any]] = [
    {"layout": "messages"},
    {"layout": "messages", "tools": "tools"},
    {"layout": "sharegpt"},
    {"layout": "alpaca"},
    {"layout": "prompt_completion"},
    {"layout": "auto"},
    {"layout": "prompt_answer", "prompt": "{prompt}", "answer": "{text}"},
    {"layout": "text"},
    {"layout": "preference"},
]
COLUMNS = {
    **GOOD, "conversations": [], "instruction": "", "output": "", "prompt": "", "completion": "", "text": "", "tools": [],
    "id": "x", "at": "2026-09-01", "kind": "k",
}  # fmt: skip

PAIR = {"prompt": "hi", "chosen": "ho", "rejected": "hum"}


def read_all(root: Path, data: DataParams, params: ValidateParams, forgotten: Forgotten | None) -> tuple[Any, ...]:
    """What the stage does between opening the files and judging the set of rows."""
    longest = 65_536 + 6 * params.max_bytes
    files, _ = find_files(data.raw, root)
    read_as = mappings(data, params, files, root, longest)
    tally = _Tally(set(), set())
    schema = ROWS if data.tools is None else TOOL_ROWS
    if data.layout == "preference":
        schema = PREFERENCES
    with (
        ParquetRows(root / "rows.parquet", schema) as rows,
        ParquetRows(root / "kept.parquet", QUARANTINE) as kept,
        Lookers(Looker(read_as, forgotten, schema), files) as lookers,
    ):
        for file in files:
            _read_file(file, lookers, params.duplicates, longest, tally, rows, kept)
    found = [pq.read_table(root / name).to_pylist() for name in ("rows.parquet", "kept.parquet")]
    return tally, *found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(lines=st.lists(LINE, max_size=12), layout=st.sampled_from(LAYOUTS), forget=st.booleans())
def test_every_line_is_accepted_quarantined_or_forgotten_and_nothing_raises(
    lines: list[bytes], layout: dict[str, Any], forget: bool
) -> None:
    root = Path(tempfile.mkdtemp(prefix="regraft-properties-"))
    try:
        (root / "data/raw").mkdir(parents=True)
        columns = COLUMNS | (PAIR if layout["layout"] == "preference" else {})
        (root / "data/raw/a.jsonl").write_bytes(b"".join(line + b"\n" for line in [as_line(columns), *lines]))
        data = DataParams.model_validate({**layout, "id": "id", "time": "at", "slices": ["kind"]})
        empty = Forgotten("salt")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        forgotten = empty.adding([("content", empty.of_content(messages))]) if forget else None
        tally, rows, kept = read_all(root, data, ValidateParams(max_bytes=200), forgotten)
    finally:
        shutil.rmtree(root)
    counts = tally.counts
    assert counts.rows_in + counts.forgotten == len(lines) + 1
    assert counts.rows_in == len(rows) + len(kept)
    assert sorted([*(row["line"] for row in rows), *(row["line"] for row in kept)]) == sorted(
        {row["line"] for row in [*rows, *kept]}
    ), "a line is in two places"
    assert all(row["reasons"] and row["reasons"] == [each for each in Reason if row[each.value]] for row in kept)
    for row in rows:
        text = json.dumps(row["messages"], ensure_ascii=False)
        text.encode()  # what is accepted can be written
        assert "someone@example.com" not in text
        assert "4111 1111 1111 1111" not in text
        assert len(row["messages"]) > (0 if layout["layout"] == "text" else 1)
        if forget:
            assert row["messages"] != messages
    for row in kept:
        assert "someone@example.com" not in row["raw"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    content=st.binary(max_size=300),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst"]),
)
def test_any_bytes_under_any_name_are_read_to_the_end_without_an_error_of_their_own(
    content: bytes, suffix: str
) -> None:
    root = Path(tempfile.mkdtemp(prefix="regraft-properties-"))
    try:
        (root / f"a{suffix}").write_bytes(content)
        [file], _ = find_files([f"a{suffix}"], root)
        opened = Opened()
        rows = list(read_rows(file, 1_000, opened))
    finally:
        shutil.rmtree(root)
    assert opened.digest or opened.problem
    assert all((row.record is None) == (row.reason is not None) for row in rows)
    if not any(row.record is not None for row in rows):
        assert opened.problem is not None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values()))[:30])
def test_the_layouts_that_are_tried_at_random_accept_something(layout: dict[str, Any], stage: Any) -> None:
    record = {**COLUMNS, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    record |= {"instruction": "a", "output": "b", "prompt": "a", "completion": "b", "text": "c"}
    record |= PAIR if layout["layout"] == "preference" else {}
    stage.write("a.jsonl", as_line(record) + b"\n")
    assert stage.run(layout).rows_out == 1
