"""What is found in a batch of rows: everything that needs no other batch, so that several processes may look at once.

Nothing here depends on who looks, or when: the same batch gives the same tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from regraft.validate.forgotten import Forgotten
from regraft.validate.mapping import Mapping, Row, row_digests
from regraft.validate.measures import FOREIGN, OTHER_LANGUAGE, measure
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.patterns import mask
from regraft.validate.quarantine import accepted, quarantine_table, quarantined
from regraft.validate.raw import RawRow, parsed
from regraft.validate.template import as_text

COUNTED = (FOREIGN, OTHER_LANGUAGE)
"""Columns that are no reason by themselves."""
_LABEL = 1_000  # characters of a label that are looked at


@dataclass
class Looked:
    """What was found in a batch."""

    lines: list[int]
    """Where each row begins that is not to be forgotten; places below are places in this list."""
    readable: int
    """Rows of the batch that could be read."""
    forgotten: int
    """Rows of the batch that are to be forgotten."""
    reasons: dict[int, list[Reason]]
    """Why a row is quarantined, by its place, for those that are."""
    kept: pa.Table
    """Those rows, as quarantine.parquet has them."""
    fit: list[int]
    """Places of the rows that nothing is wrong with."""
    rows: pa.Table
    """Those rows, as rows.parquet has them."""
    keys: list[bytes]
    """Of each of them, what tells duplicates."""
    slices: dict[str, list[str | None]]
    """Of each of them, the value of each slice."""
    labels: list[str] = field(default_factory=list)
    """Labels that are not allowed, masked and cut."""
    counted: dict[str, Any] = field(default_factory=dict)
    """Of every row, in an Arrow array, whether it is in other scripts (`FOREIGN`), and in other languages, where that is
    looked at."""


@dataclass
class Looker:
    """How files are read; what every process that looks at batches holds."""

    mappings: dict[str, Mapping]
    """By the name of the file."""
    forgotten: Forgotten | None
    schema: pa.Schema
    """Of rows.parquet."""

    def look(self, name: str, batch: Sequence[RawRow]) -> Looked:
        """Parse, map, measure and digest rows of a file.

        Args:
            name: of the file.
            batch: rows as `read_rows` yields them, parsed or not.
        """
        mapping = self.mappings[name]
        raws = [parsed(raw) for raw in batch]
        readable = sum(raw.record is not None for raw in raws)
        rows, measured = measure(raws, mapping)
        if self.forgotten is not None:
            stay = [i for i in range(len(raws)) if not _is_forgotten(self.forgotten, raws[i], rows[i], mapping.data)]
            raws, rows, measured = (
                [raws[i] for i in stay],
                [rows[i] for i in stay],
                measured.take(pa.array(stay, pa.int64())),
            )

        reasons = _reasons(measured)
        fit = [place for place, row in enumerate(rows) if row is not None and place not in reasons]
        good: list[Any] = [rows[place] for place in fit]
        digests = [row_digests(row) for row in good]
        names = sorted({*mapping.data.slices, *([] if mapping.source is None else ["source"])})
        hide = masker(mapping.params)
        kept = [
            quarantined(name, raws[i], id_of(raws[i], rows[i], mapping.data), why, hide) for i, why in reasons.items()
        ]
        return Looked(
            lines=[raw.line for raw in raws],
            readable=readable,
            forgotten=len(batch) - len(raws),
            reasons=reasons,
            kept=quarantine_table(kept),
            fit=fit,
            rows=accepted(self.schema, [each[0] for each in digests], name, [raws[i].line for i in fit], good),
            keys=[each[1] for each in digests],
            slices={each: [row.slices.get(each) for row in good] for each in names},
            labels=[_shown(row.label, hide) for row in rows if row is not None and row.label is not None],
            counted={each: measured[each].combine_chunks() for each in COUNTED if each in measured.column_names},
        )


def id_of(raw: RawRow, row: Row | None, data: DataParams) -> str | None:
    """Return a row's own name, also of one that makes no conversation."""
    if row is not None:
        return row.id
    if raw.record is None or data.id is None:
        return None
    return as_text(raw.record.get(data.id)) or None


def _reasons(measured: pa.Table) -> dict[int, list[Reason]]:
    """Return the reasons of each row that has one, in the order of `Reason`."""
    found: dict[int, list[Reason]] = {}
    for reason in Reason:
        if reason.value in measured.column_names:
            places: list[Any] = pc.indices_nonzero(measured[reason.value]).to_pylist()
            for place in places:
                found.setdefault(place, []).append(reason)
    return dict(sorted(found.items()))


def _is_forgotten(forgotten: Forgotten, raw: RawRow, row: Row | None, data: DataParams) -> bool:
    identity = id_of(raw, row, data)
    return forgotten.holds(None, identity) if row is None else forgotten.holds(row.messages, identity, row.rejected)


def masker(params: ValidateParams) -> Callable[[str], str]:
    """Return what hides personal data: always what patterns find, and what Presidio finds where it is asked."""
    if params.personal is None:
        return mask
    from regraft.validate.personal import analyst

    hide = analyst(params.personal).mask
    return lambda text: hide(mask(text))


def _shown(label: str, hide: Callable[[str], str]) -> str:
    return hide(label[:_LABEL]).encode(errors="replace").decode()[:40]
