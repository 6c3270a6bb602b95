"""The stage: read what is in `data.raw`, quarantine the rows that break the contract, judge the set of rows.

A row goes to exactly one of rows.parquet and quarantine.parquet. Rows are read in batches; what grows with their number
in memory is small: a digest of 16 bytes for each (to tell duplicates) and the frame of measured columns.
"""

import gc
import hashlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from regraft.artifacts import commit_dir
from regraft.errors import DataError, GateRefused, ParamsError
from regraft.failpoints import failpoint
from regraft.validate.expectations import Counts, Expected, expected
from regraft.validate.forgotten import FORGET, Forgotten, shape_of
from regraft.validate.forgotten import load as load_forgotten
from regraft.validate.mapping import Mapping, Row, row_digests
from regraft.validate.measures import FOREIGN, measure
from regraft.validate.params import OTHER, DataParams, Reason, ValidateParams
from regraft.validate.patterns import mask
from regraft.validate.quarantine import PREFERENCES, QUARANTINE, ROWS, TOOL_ROWS, ParquetRows, accepted, quarantined
from regraft.validate.report import ExpectationResult, FileResult, TimeRange, ValidateReport
from regraft.validate.seen import Seen
from regraft.validate.source import DataFile, Opened, RawRow, find_files, read_rows
from regraft.validate.sources import mappings
from regraft.validate.template import as_text

log = logging.getLogger("regraft")
_Item = TypeVar("_Item")
_BATCH = 4_096  # rows measured at once
_MOST_VALUES = 1_000  # of a slice
_PLACES = 10  # shown for each reason
_LABELS = 20  # unknown ones shown


def validate(params: ValidateParams, data: DataParams, *, raw_root: Path, out: Path, docs: Path) -> ValidateReport:
    """Validate the raw files and write rows.parquet, quarantine.parquet and report.json into `out`.

    Args:
        params: what rows must fulfil.
        data: where they are and how they are read.
        raw_root: the folder to which the entries of `data.raw` are relative.
        out: the committed output folder.
        docs: the committed folder of the HTML data docs, with a copy of report.json; where the data is refused, of
            quarantine.parquet too, since DVC puts `out` back to its last success then.

    Returns:
        The report, which is also in both folders.

    Raises:
        DataError: no data file, an unreadable file, or files that differ in their columns.
        ParamsError: `data` names a column that no file has, or a slice with very many values.
        GateRefused: an expectation of level `block` failed; both folders are written before.
    """
    from regraft.validate.docs import finish
    from regraft.validate.suite import run_suite

    _check_slices(params, data)
    files, ignored = find_files(data.raw, raw_root)
    longest = 65_536 + 6 * params.max_bytes  # an escape such as \u00e9 has 6 bytes
    read_as = mappings(data, params, files, raw_root, longest)
    forgotten = load_forgotten(raw_root / FORGET, data.forget, shape=shape_of(data))

    shares = params.expectations.sources
    tally = _Tally(
        set(params.expectations.reasons),
        set(params.expectations.slices) | ({"source"} if shares else set()),
        set(shares),
    )
    if params.scripts is not None:
        tally.counts.foreign = 0
    schema = ROWS if all(each.data.tools is None for each in read_as.values()) else TOOL_ROWS
    if any(each.preferences for each in read_as.values()):
        schema = PREFERENCES
    with commit_dir(out) as folder:
        with ExitStack() as stack:
            rows = stack.enter_context(ParquetRows(folder / "rows.parquet", schema))
            kept = stack.enter_context(ParquetRows(folder / "quarantine.parquet", QUARANTINE))
            stack.enter_context(_fewer_collections())
            for file in files:
                _read_file(file, read_as[file.name], forgotten, longest, tally, rows, kept)
        if not tally.counts.rows_in:
            problems = [f"{name}: {problem}" for name, problem in sorted(tally.counts.unreadable.items())]
            raise DataError(
                "\n  ".join((f"there is not one row in {', '.join(data.raw)}", *problems)), fix="put rows there"
            )
        assert tally.counts.rows_in == rows.count + kept.count, "a row was lost, or is in two places"
        failpoint("validate.read")

        wanted = expected(params.expectations, tally.counts)
        with commit_dir(docs) as site:
            passed = run_suite(wanted, tally.frames(), site)
            report = _report(tally, wanted, passed, ignored)
            finish(site, report, tally.places)
            if not report.passed:
                shutil.copyfile(folder / "quarantine.parquet", site / "quarantine.parquet")
        report.save(folder / "report.json")
    _announce(report, docs)
    return report


@dataclass
class _Tally:
    """What is remembered from batch to batch."""

    watched: set[Reason]
    sliced: set[str]
    shares: set[str] = field(default_factory=set)
    """Sources whose share is expected."""
    counts: Counts = field(default_factory=Counts)
    seen: Seen = field(default_factory=Seen)
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    labels: Counter[str] = field(default_factory=Counter)
    places: dict[Reason, list[str]] = field(default_factory=dict)
    files: dict[str, FileResult] = field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    flags: list[pa.Table] = field(default_factory=list)
    values: dict[str, list[str | None]] = field(default_factory=dict)
    logged: float = field(default_factory=time.monotonic)

    def report_progress(self) -> None:
        """Log how far reading is, every ten seconds."""
        if (now := time.monotonic()) - self.logged > 10:
            self.logged = now
            log.info("%s rows read", f"{self.counts.rows_in:,}")

    def frames(self) -> dict[str, pa.Table]:
        """Return the frames of measured columns; see `expectations.py`."""
        rows = pa.concat_tables(self.flags)
        for name in sorted(self.sliced):
            values = self.values.get(name, [None] * rows.num_rows)
            counted = self.counts.slices.get(name, Counter())
            rows = rows.append_column(name, pa.array(values, pa.string()))
            numbers = [None if value is None else float(counted[value]) for value in values]
            rows = rows.append_column(f"rows of {name}", pa.array(numbers, pa.float64()))
        for name in sorted(self.shares):
            found = [None if value is None else float(value == name) for value in self.values.get("source", [])]
            rows = rows.append_column(f"from {name}", pa.array(found, pa.float64()))
        unreadable = [int(file.problem is not None) for file in self.files.values()]
        return {"rows": rows, "files": pa.table({"unreadable": pa.array(unreadable, pa.int8())})}


@contextmanager
def _fewer_collections() -> Iterator[None]:
    """Let the collector of cycles look less often: rows hold none, and looking at them took a third of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _read_file(
    file: DataFile,
    mapping: Mapping,
    forgotten: Forgotten | None,
    longest: int,
    tally: _Tally,
    rows: ParquetRows,
    kept: ParquetRows,
) -> None:
    opened = Opened()
    rows_before, kept_before = rows.count, kept.count
    for batch in _batched(read_rows(file, longest, opened), _BATCH):
        made, measured = measure(batch, mapping)
        if forgotten is not None:
            stay = [i for i in range(len(batch)) if not _is_forgotten(forgotten, batch[i], made[i], mapping.data)]
            tally.counts.forgotten += len(batch) - len(stay)
            batch, made, measured = (
                [batch[i] for i in stay],
                [made[i] for i in stay],
                measured.take(pa.array(stay, pa.int64())),
            )
        flags: dict[str, list[int]] = {"accepted": [], "quarantined": [], "duplicate": []}
        reasons_of = _reasons(measured)
        digests = [
            row_digests(row) if row is not None and not reasons else None
            for row, reasons in zip(made, reasons_of, strict=True)
        ]
        again = iter(tally.seen.add([each[1] for each in digests if each is not None]))
        for place, (raw, row) in enumerate(zip(batch, made, strict=True)):
            reasons = reasons_of[place]
            duplicate = False
            if row is not None and (digest := digests[place]) is not None:
                duplicate = next(again)
                if duplicate and mapping.params.duplicates == "quarantine":
                    reasons.append(Reason.DUPLICATE)
                else:
                    rows.add(accepted(digest[0], file.name, raw.line, row))
                    tally.digest.update(digest[0].encode() + b"\n")
            if reasons:
                kept.add(quarantined(file.name, raw, _id_of(raw, row, mapping.data), reasons))
            _count(tally, row, reasons, duplicate, f"{file.name}:{raw.line}")
            flags["accepted"].append(int(not reasons))
            flags["quarantined"].append(int(bool(reasons)))
            flags["duplicate"].append(int(duplicate))
        for reason in sorted(tally.watched):
            flags[reason.value] = [int(reason in reasons) if reasons else 0 for reasons in reasons_of]
        if tally.counts.foreign is not None:
            flags[FOREIGN] = [int(bool(each)) for each in measured[FOREIGN].to_pylist()]
            tally.counts.foreign += sum(flags[FOREIGN])
        tally.report_progress()
        tally.flags.append(pa.table({name: pa.array(values, pa.int8()) for name, values in flags.items()}))
    new, bad = rows.count - rows_before, kept.count - kept_before
    tally.files[file.name] = FileResult(sha256=opened.digest, rows=new + bad, quarantined=bad, problem=opened.problem)
    if opened.problem is not None:
        tally.counts.unreadable[file.name] = opened.problem


def _reasons(measured: pa.Table) -> list[list[Reason]]:
    """Return the reasons of each row, in the order of `Reason`."""
    found: list[list[Reason]] = [[] for _ in range(measured.num_rows)]
    for reason in Reason:
        if reason.value in measured.column_names:
            places: list[Any] = pc.indices_nonzero(measured[reason.value]).to_pylist()
            for place in places:
                found[place].append(reason)
    return found


def _count(tally: _Tally, row: Row | None, reasons: list[Reason], duplicate: bool, place: str) -> None:
    counts = tally.counts
    counts.rows_in += 1
    counts.duplicates += duplicate
    counts.reasons.update(reasons)
    for reason in reasons:
        places = tally.places.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(place)
    if row is not None and row.label is not None and len(tally.labels) < _MOST_VALUES:
        tally.labels[mask(row.label[:_MOST_VALUES]).encode(errors="replace").decode()[:40]] += 1
    values = row.slices if row is not None and not reasons else {}
    for name in tally.sliced:
        tally.values.setdefault(name, []).append(values.get(name))
    if row is None or reasons:
        return
    counts.accepted += 1
    for name, value in row.slices.items():
        counted = counts.slices.setdefault(name, Counter())
        counted[value] += 1
        if len(counted) > _MOST_VALUES:
            raise ParamsError(
                f"data.slices.{name} has over {_MOST_VALUES:,} different values; a slice is a small set",
                fix="take it out of `data.slices`, or use a column with fewer values",
            )
    if row.at is not None:
        tally.first = row.at if tally.first is None else min(tally.first, row.at)
        tally.last = row.at if tally.last is None else max(tally.last, row.at)


def _report(tally: _Tally, wanted: list[Expected], passed: dict[str, bool], ignored: list[str]) -> ValidateReport:
    counts = tally.counts
    results = [
        ExpectationResult(
            name=each.name,
            level=each.level,
            # Fail closed: where the library's answer and our own count differ, it has not passed.
            passed=passed[each.name] and each.holds,
            measured=each.measured,
            threshold=each.threshold,
            rows=each.rows,
            detail=each.detail,
        )
        for each in wanted
    ]
    return ValidateReport(
        rows_in=counts.rows_in + counts.forgotten,
        rows_out=counts.accepted,
        rows_quarantined=counts.quarantined,
        rows_duplicate=counts.duplicates,
        quarantined_by_reason={each.value: counts.reasons[each] for each in Reason if counts.reasons[each]},
        unknown_labels=dict(sorted(tally.labels.items(), key=lambda item: (-item[1], item[0]))[:_LABELS]),
        expectations=results,
        passed=all(each.passed for each in results if each.level == "block"),
        slices={name: dict(sorted(counted.items())) for name, counted in sorted(counts.slices.items())},
        time=TimeRange(first=tally.first, last=tally.last),
        files=dict(sorted(tally.files.items())),
        ignored=ignored,
        rows_forgotten=counts.forgotten,
        rows_in_other_scripts=counts.foreign,
        data_digest=tally.digest.hexdigest(),
    )


def _announce(report: ValidateReport, docs: Path) -> None:
    """Log what was found, without a row's text; raise where an expectation of level `block` failed."""
    log.info(
        "%s rows read, %s accepted, %s quarantined, %s duplicates",
        *(f"{n:,}" for n in (report.rows_in, report.rows_out, report.rows_quarantined, report.rows_duplicate)),
    )
    if report.rows_forgotten:
        log.info("%s rows left out: they are to be forgotten", f"{report.rows_forgotten:,}")
    for reason, count in report.quarantined_by_reason.items():
        log.info("  quarantined: %s: %d", reason, count)
    failed = [each for each in report.expectations if not each.passed]
    lines = {each.name: _line(each) for each in failed}
    for each in failed:
        if each.level == "warn":
            log.warning("warning: %s", lines[each.name])
    if not report.passed:
        blocked = [lines[each.name] for each in failed if each.level == "block"]
        raise GateRefused(
            "the data was refused:\n  " + "\n  ".join(blocked),
            fix=f"read {docs / 'index.html'}, look at the refused rows in {docs / 'quarantine.parquet'}, and mend the data"
            " or change `validate.expectations` in params.yaml",
        )


def _line(each: ExpectationResult) -> str:
    detail = f"; {each.detail}" if each.detail else ""
    return f"{each.name}: measured {each.measured:.6g}, threshold {each.threshold:.6g}{detail}"


def _check_slices(params: ValidateParams, data: DataParams) -> None:
    known = data.slice_names()
    if unknown := sorted(set(params.expectations.slices) - known):
        raise ParamsError(
            f"validate.expectations.slices names {', '.join(unknown)}; "
            f"data.slices has {', '.join(sorted(known)) or 'none'}",
            fix="edit params.yaml",
        )
    if unknown := sorted(set(params.expectations.sources) - {*data.sources, OTHER}):
        raise ParamsError(
            f"validate.expectations.sources names {', '.join(unknown)}; "
            f"data.sources has {', '.join(data.sources) or 'none'}",
            fix="edit params.yaml",
        )


def _is_forgotten(forgotten: Forgotten, raw: RawRow, row: Row | None, data: DataParams) -> bool:
    identity = _id_of(raw, row, data)
    return forgotten.holds(None, identity) if row is None else forgotten.holds(row.messages, identity, row.rejected)


def _id_of(raw: RawRow, row: Row | None, data: DataParams) -> str | None:
    if row is not None:
        return row.id
    if raw.record is None or data.id is None:
        return None
    return as_text(raw.record.get(data.id)) or None


def _batched(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch
