"""A row as it was read, and JSON that is read strictly: an object in which a name occurs twice is no row.

Which of the two values is meant nobody can say (RFC 8259, section 4), and parsers that take the last one lose the other silently.
"""

import json
from typing import Any, NamedTuple

from regraft.validate.params import Reason


class RawRow(NamedTuple):
    """A row as it was read: `record` where it could be, else the reason why not; neither, while it is not parsed."""

    line: int
    """Where the row begins, from 1 (in a .json file the place in its list)."""
    raw: bytes
    """The row's own bytes; for an over-long one its beginning."""
    record: dict[str, Any] | None = None
    reason: Reason | None = None


def parsed(row: RawRow) -> RawRow:
    """Return a row of JSON parsed, and any other as it is."""
    if row.record is not None or row.reason is not None:
        return row
    line, raw = row.line, row.raw
    try:
        value = _ROW.decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return RawRow(line, raw, reason=Reason.NOT_UTF8)
    except _TwiceError:
        return RawRow(line, raw, reason=Reason.DUPLICATE_KEYS)
    except (ValueError, RecursionError):
        return RawRow(line, raw, reason=Reason.NOT_JSON)
    return RawRow(line, raw, record=value) if isinstance(value, dict) else RawRow(line, raw, reason=Reason.NOT_JSON)


def bounded(row: RawRow, longest: int) -> RawRow:
    """Return a row of more than `longest` bytes as a line of so many would be: its beginning, and not parsed."""
    return row if len(row.raw) <= longest else RawRow(row.line, row.raw[:longest], reason=Reason.OVER_LONG)


def parse(text: str) -> Any:
    """Return a JSON value whose objects may have names that occur twice; `has_twice` finds those.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deep.
    """
    try:
        return _ROW.decode(text)
    except _TwiceError:
        return json.loads(text, object_pairs_hook=_marked)


def has_twice(value: Any) -> bool:
    """Say whether a name occurs twice in an object anywhere in what `parse` returned."""
    if isinstance(value, dict):
        return isinstance(value, _Twice) or any(map(has_twice, value.values()))
    return isinstance(value, list) and any(map(has_twice, value))


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Twice(pairs)


class _TwiceError(ValueError):
    """A name occurs twice in an object."""


class _Twice(dict[str, Any]):
    """An object in which a name occurs twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object whose names are different."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _TwiceError
    return made


_ROW = json.JSONDecoder(object_pairs_hook=_once)
