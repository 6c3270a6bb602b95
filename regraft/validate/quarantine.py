"""Where rows go: accepted ones to rows.parquet, the others to quarantine.parquet with reasons and masked.

In quarantine.parquet every `Reason` has a column of its own, whether it occurs or not, so that the schema is the same for
every run and a reason is counted by a sum; `reasons` lists those that are true, in the same order, for who reads a row.
Both files hold the rows in the order in which they were read, in row groups whose sizes follow from the rows alone, and no
time: the same rows give the same bytes.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from regraft.messages import EXTRAS
from regraft.validate.mapping import Row
from regraft.validate.params import Reason
from regraft.validate.patterns import mask
from regraft.validate.raw import RawRow
from regraft.validate.template import as_text

_MESSAGE: dict[str, Any] = {"role": pa.string(), "content": pa.string()}
_ROWS: dict[str, Any] = {
    "row_id": pa.string(),
    "source": pa.string(),
    "line": pa.int64(),
    "messages": pa.list_(pa.struct(_MESSAGE)),
    "slices": pa.map_(pa.string(), pa.string()),
    "at": pa.string(),
    "id": pa.string(),
}
_QUARANTINE: dict[str, Any] = {
    "source": pa.string(),
    "line": pa.int64(),
    "id": pa.string(),
    "raw": pa.string(),
    "reasons": pa.list_(pa.string()),
}
_REASONS = [reason.value for reason in Reason]
Hide = Callable[[str], str]
"""Replaces personal data in a text by its kind."""
ROWS = pa.schema(_ROWS)
"""Columns of rows.parquet."""
TOOL_ROWS = pa.schema(_ROWS | {"messages": pa.list_(pa.struct(_MESSAGE | dict.fromkeys(EXTRAS, pa.string())))})
"""The same where a row may call tools; see `regraft.messages`."""
PREFERENCES = pa.schema({**_ROWS, "rejected": pa.string(), "wanted": pa.bool_()})
"""Of accepted rows that are preferences: the other answer of a pair, or whether the one answer is wanted."""
QUARANTINE = pa.schema([*pa.schema(_QUARANTINE), *(pa.field(each, pa.bool_(), nullable=False) for each in _REASONS)])
"""Columns of quarantine.parquet: where a row is, what is kept of it, and of each reason whether it is one."""
_GROUP, _GROUP_BYTES = 10_000, 64 * 2**20  # rows of a row group, and bytes of text from which on it has fewer
_SHOWN = 2_000  # characters of a quarantined row
_LOOKED_AT = 20_000  # characters masked before the cut, so that what the cut divides is masked too
_LONG_NUMBER = 1_000_000
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")


class ParquetRows:
    """A Parquet file of row groups of `_GROUP` rows, or of fewer long ones, whatever the tables that it is given."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = self._bytes = 0
        self.count = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self.count += table.num_rows
        ends = np.cumsum(_sizes(table))
        start = before = 0
        while start < table.num_rows:
            full = int(np.searchsorted(ends, before + _GROUP_BYTES - self._bytes)) + 1
            end = min(start + _GROUP - self._rows, full, table.num_rows)
            self._waiting.append(table.slice(start, end - start))
            self._rows += end - start
            self._bytes += int(ends[end - 1]) - before
            start, before = end, int(ends[end - 1])
            if self._rows == _GROUP or self._bytes >= _GROUP_BYTES:
                self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=_GROUP)
        self._waiting = []
        self._rows = self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._rows:
                self._write()
        finally:
            self._writer.close()


def _sizes(table: pa.Table) -> np.ndarray:
    """Return how many bytes of text each row has, in all columns and at any depth."""

    def of(values: Any) -> np.ndarray:
        if pa.types.is_string(values.type):
            lengths: np.ndarray = pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
            return lengths
        if pa.types.is_struct(values.type):
            return sum(map(of, values.flatten()), np.zeros(len(values), np.int64))
        if pa.types.is_list(values.type) or pa.types.is_map(values.type):
            ends = np.concatenate([[0], np.cumsum(of(values.values))])
            return np.diff(ends[values.offsets.to_numpy()])
        return np.zeros(len(values), np.int64)

    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        sizes += np.concatenate([np.empty(0, np.int64), *map(of, column.chunks)])
    return sizes


def accepted(
    schema: pa.Schema, row_ids: Sequence[str], source: str, lines: Sequence[int], rows: Sequence[Row]
) -> pa.Table:
    """Return accepted rows of a file as rows.parquet holds them."""
    columns: dict[str, Any] = {
        "row_id": row_ids,
        "source": [source] * len(rows),
        "line": lines,
        "messages": _messages([row.messages for row in rows], schema.field("messages").type),
        "slices": [list(row.slices.items()) for row in rows],
        "at": [row.at for row in rows],
        "id": [row.id for row in rows],
        "rejected": [row.rejected for row in rows],
        "wanted": [row.wanted for row in rows],
    }
    return pa.Table.from_arrays(
        [
            each if isinstance(each, pa.Array) else pa.array(each, schema.field(name).type)
            for name in schema.names
            for each in [columns[name]]
        ],
        schema=schema,
    )


def _messages(conversations: Sequence[list[dict[str, str]]], kind: Any) -> Any:
    """Return lists of messages as an Arrow column, without a look at each message by Arrow."""
    ends = pa.array([0, *accumulate(map(len, conversations))], pa.int32())
    flat = list(chain.from_iterable(conversations))
    members = [pa.array([each.get(member.name) for each in flat], member.type) for member in kind.value_type]
    return pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays(members, fields=list(kind.value_type)), type=kind)


def quarantined(
    source: str, raw: RawRow, identity: str | None, reasons: Sequence[Reason], hide: Hide = mask
) -> dict[str, Any]:
    """Return a row as quarantine.parquet holds it: at most 2,000 characters, personal data and secrets masked by `hide`."""
    return {
        "source": source,
        "line": raw.line,
        "id": None if identity is None else hide(_clean(identity[:_SHOWN])),
        "raw": shown(raw, hide),
        "reasons": [reason.value for reason in reasons],
    }


def quarantine_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return what `quarantined` made as a table of `QUARANTINE`.

    Raises:
        ValueError: a row has no reason, or one that is no `Reason`: nobody could tell why it is here.
    """
    import numpy as np

    kinds: dict[tuple[str, ...], int] = {}  # few: most rows are bad in one of a few ways
    kind_of = [kinds.setdefault(tuple(row["reasons"]), len(kinds)) for row in rows]
    for reasons, kind in kinds.items():
        if not reasons or not set(_REASONS).issuperset(reasons):
            row = rows[kind_of.index(kind)]
            raise ValueError(f"{row['source']}:{row['line']} is quarantined for {reasons}; expected a Reason or more")
    flags = np.array([[each in reasons for reasons in kinds] for each in _REASONS], bool)[:, kind_of]
    plain = [pa.array([row[name] for row in rows], kind) for name, kind in _QUARANTINE.items()]
    return pa.Table.from_arrays([*plain, *map(pa.array, flags)], schema=QUARANTINE)


def shown(raw: RawRow, hide: Hide = mask) -> str:
    """Return what is kept of a quarantined row.

    A row that was read is masked value by value and written anew as JSON, so that an escaped character hides nothing;
    of one that could not be read, the bytes are decoded first.
    """
    if raw.record is not None:
        try:
            return _clean(as_text(masked(raw.record, hide)))[:_SHOWN]
        except RecursionError:
            pass  # nested as deep as the parser goes: shown as it stands in the file
    text = raw.raw.decode("utf-8", errors="replace")
    return mask_start(_ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), text), hide)[:_SHOWN]


def mask_start(text: str, hide: Hide = mask) -> str:
    """Return the masked beginning of a text, without the end, where something half cut off would not be known."""
    return hide(text) if len(text) <= _LOOKED_AT else hide(text[:_LOOKED_AT])[:-1_000]


def masked(value: Any, hide: Hide = mask) -> Any:
    """Return a JSON value with personal data masked in the beginning of each text and in long numbers."""
    if isinstance(value, str):
        return mask_start(value, hide)
    if isinstance(value, dict):
        return {mask_start(str(key)): masked(each, hide) for key, each in value.items()}
    if isinstance(value, list):
        return [masked(each, hide) for each in value]
    if isinstance(value, int | float):
        # Nothing that a short number could be is personal, and rows may hold thousands of them.
        found = (hide if isinstance(value, int) and abs(value) >= _LONG_NUMBER else mask)(str(value))
        return value if found == str(value) else found
    return value


def _clean(text: str) -> str:
    """Return the text with lone surrogates, which no file can hold, replaced."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
