"""Where rows go: accepted ones to rows.parquet, the others to quarantine.parquet with reasons and masked.

Both files hold the rows in the order in which they were read, in row groups of a fixed size, and no time: the same rows
give the same bytes.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from regraft.messages import EXTRAS
from regraft.validate.mapping import Row
from regraft.validate.params import Reason
from regraft.validate.patterns import mask
from regraft.validate.source import RawRow
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
ROWS = pa.schema(_ROWS)
"""Columns of rows.parquet."""
TOOL_ROWS = pa.schema(_ROWS | {"messages": pa.list_(pa.struct(_MESSAGE | dict.fromkeys(EXTRAS, pa.string())))})
"""The same where a row may call tools; see `regraft.messages`."""
PREFERENCES = pa.schema({**_ROWS, "rejected": pa.string(), "wanted": pa.bool_()})
"""Of accepted rows that are preferences: the other answer of a pair, or whether the one answer is wanted."""
QUARANTINE = pa.schema(_QUARANTINE)
_GROUP = 10_000  # rows of a row group
_SHOWN = 2_000  # characters of a quarantined row
_LOOKED_AT = 20_000  # characters masked before the cut, so that what the cut divides is masked too
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")


class ParquetRows:
    """A Parquet file written row by row, a row group of `_GROUP` rows at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._waiting: list[dict[str, Any]] = []
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._waiting.append(row)
        self.count += 1
        if len(self._waiting) == _GROUP:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema), row_group_size=_GROUP)
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._waiting:
                self._write()
        finally:
            self._writer.close()


def accepted(row_id: str, source: str, line: int, row: Row) -> dict[str, Any]:
    """Return an accepted row as rows.parquet holds it."""
    own = {"rejected": row.rejected, "wanted": row.wanted} if row.is_preference else {}
    return {
        "row_id": row_id,
        "source": source,
        "line": line,
        "messages": row.messages,
        "slices": list(row.slices.items()),
        "at": row.at,
        "id": row.id,
        **own,
    }


def quarantined(source: str, raw: RawRow, identity: str | None, reasons: Sequence[Reason]) -> dict[str, Any]:
    """Return a row as quarantine.parquet holds it: at most 2,000 characters, personal data and secrets masked."""
    return {
        "source": source,
        "line": raw.line,
        "id": None if identity is None else mask(_clean(identity[:_SHOWN])),
        "raw": shown(raw),
        "reasons": [reason.value for reason in reasons],
    }


def shown(raw: RawRow) -> str:
    """Return what is kept of a quarantined row.

    A row that was read is masked value by value and written anew as JSON, so that an escaped character hides nothing;
    of one that could not be read, the bytes are decoded first.
    """
    if raw.record is not None:
        try:
            return _clean(as_text(_masked(raw.record)))[:_SHOWN]
        except RecursionError:
            pass  # nested as deep as the parser goes: shown as it stands in the file
    text = raw.raw.decode("utf-8", errors="replace")
    return _mask_start(_ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), text))[:_SHOWN]


def _mask_start(text: str) -> str:
    """Return the masked beginning of a text, without the end, where something half cut off would not be known."""
    return mask(text) if len(text) <= _LOOKED_AT else mask(text[:_LOOKED_AT])[:-1_000]


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return _mask_start(value)
    if isinstance(value, dict):
        return {_mask_start(str(key)): _masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each) for each in value]
    if isinstance(value, int | float) and mask(str(value)) != str(value):
        return mask(str(value))
    return value


def _clean(text: str) -> str:
    """Return the text with lone surrogates, which no file can hold, replaced."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
