"""The frame of measured columns: for a batch of rows, a boolean column for each reason to quarantine, computed in Arrow.

Regular expressions run over a column at once (RE2, linear time). Only texts that a cheap pattern points at are looked
at one by one, for what an expression cannot say (a check digit).
"""

from collections.abc import Sequence, Sized
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from regraft.validate import patterns
from regraft.validate.mapping import Mapping, Row
from regraft.validate.params import Reason, ValidateParams
from regraft.validate.raw import RawRow

_TEXT = {"control_characters": patterns.CONTROL, "bidi_characters": patterns.BIDI, "mojibake": patterns.MOJIBAKE}
FOREIGN = "foreign"
"""The column of rows in other scripts than those allowed; not a reason by itself."""
OTHER_LANGUAGE = "other_language"
"""The column of rows in other languages than those allowed; not a reason by itself."""


def measure(batch: Sequence[RawRow], mapping: Mapping) -> tuple[list[Row | None], pa.Table]:
    """Return the rows of a batch (`None` where there is none to make) and their measured columns.

    The table has a boolean column for each `Reason` but `duplicate`, which takes more than one batch to see.
    """
    rows = [None if raw.record is None else mapping.row(raw.record) for raw in batch]
    places: dict[Reason, list[int]] = {reason: [] for reason in Reason if reason != Reason.DUPLICATE}
    for place, (raw, row) in enumerate(zip(batch, rows, strict=True)):
        for reason in _given(raw, row):
            places[reason].append(place)
    columns: dict[str, Any] = {reason.value: _at(found, len(batch)) for reason, found in places.items()}

    readable = [row is not None and Reason.NOT_UTF8 not in row.reasons for row in rows]
    texts = pa.array(
        [row.text if row is not None and ok else None for row, ok in zip(rows, readable, strict=True)],
        pa.large_string(),
    )
    sizes = pa.array([0 if row is None else row.size for row in rows], pa.int64())
    columns |= _of_texts(texts, mapping.params)
    columns[Reason.EMAIL] = pc.or_(columns[Reason.EMAIL], _of_ids(rows, readable, mapping.params))
    columns[Reason.OVER_LONG] = pc.or_(
        columns[Reason.OVER_LONG], pc.greater(sizes, pa.scalar(mapping.params.max_bytes))
    )
    if mapping.params.scripts is not None:
        foreign = patterns.foreign(texts, mapping.params.scripts.allowed, mapping.params.scripts.letters)
        columns[FOREIGN] = foreign
        if mapping.params.scripts.quarantine:
            columns[Reason.FOREIGN_SCRIPT] = foreign
    columns |= _of_extras(rows, readable, mapping.params)
    return rows, pa.table(columns)


def _of_extras(rows: Sequence[Row | None], readable: Sequence[bool], params: ValidateParams) -> dict[str, Any]:
    """Return what takes a library of its own; over-long rows are not looked at, so that the time for each is bounded."""
    columns: dict[str, Any] = {}
    short = [ok and row is not None and row.size <= params.max_bytes for row, ok in zip(rows, readable, strict=True)]
    if params.language is not None:
        from regraft.validate.languages import others

        strange = others(rows, short, params.language, answers=not params.answers_are_json)
        columns[OTHER_LANGUAGE] = _at(strange, len(rows))
        if params.language.quarantine:
            columns[Reason.FOREIGN_LANGUAGE] = columns[OTHER_LANGUAGE]
    if params.personal is not None:
        from regraft.validate.personal import analyst

        finds = analyst(params.personal).finds
        found = [
            place
            for place, row in enumerate(rows)
            if short[place] and row is not None and (finds(row.text) or (row.id is not None and finds(row.id)))
        ]
        columns[Reason.PERSONAL_DATA] = _at(found, len(rows))
    return columns


def _given(raw: RawRow, row: Row | None) -> set[Reason]:
    """Return the reasons that reading and mapping gave."""
    if row is not None:
        return row.reasons
    return {Reason.WRONG_SHAPE if raw.reason is None else raw.reason}


def _of_texts(texts: Any, params: ValidateParams) -> dict[str, Any]:
    columns: dict[str, Any] = {
        kind: pc.fill_null(pc.match_substring_regex(texts, _TEXT[kind]), False) if kind in params.text else _none(texts)
        for kind in _TEXT
    }
    for kind, find in patterns.FINDERS.items():
        if kind not in params.pii:
            columns[kind] = _none(texts)
            continue
        hints: Any = pc.fill_null(pc.match_substring_regex(texts, patterns.HINTS[kind]), False)
        hinted: list[int] = pc.indices_nonzero(hints).to_pylist()
        columns[kind] = _at([i for i in hinted if next(find(texts[i].as_py()), None) is not None], len(texts))
    return columns


def _of_ids(rows: list[Row | None], readable: list[bool], params: ValidateParams) -> pa.BooleanArray:
    """Say which rows have an address for an id: it would be stored beside the row."""
    if "email" not in params.pii:
        return _none(rows)
    found = [
        place
        for place, (row, ok) in enumerate(zip(rows, readable, strict=True))
        if ok and row is not None and row.id is not None and "@" in row.id and any(patterns.find_emails(row.id))
    ]
    return _at(found, len(rows))


def _none(rows: Sized) -> pa.BooleanArray:
    return _at([], len(rows))


def _at(places: Sequence[int], rows: int) -> pa.BooleanArray:
    """Return a column that is true at these places."""
    import numpy as np

    column = np.zeros(rows, bool)
    column[list(places)] = True
    return pa.array(column)
