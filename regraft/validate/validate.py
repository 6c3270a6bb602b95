"""The stage: read what is in `data.raw`, quarantine the rows that break the contract, judge the set of rows.

A row goes to exactly one of rows.parquet and quarantine.parquet. Rows are read in batches, which several processes look at
(`work.py`) and this one puts together in order; what grows with their number in memory is small: a digest of 16 bytes for
each (to tell duplicates) and the frame of measured columns.
"""

import gc
import hashlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from regraft.artifacts import commit_dir
from regraft.errors import DataError, GateRefused, ParamsError
from regraft.failpoints import failpoint
from regraft.processes import collect_seldom
from regraft.validate.expectations import Counts, Expected, expected
from regraft.validate.forgotten import FORGET, shape_of
from regraft.validate.forgotten import load as load_forgotten
from regraft.validate.look import Looked, Looker, id_of, masker
from regraft.validate.measures import FOREIGN, OTHER_LANGUAGE
from regraft.validate.params import OTHER, DataParams, Reason, ValidateParams
from regraft.validate.quarantine import (
    PREFERENCES,
    QUARANTINE,
    ROWS,
    TOOL_ROWS,
    ParquetRows,
    quarantine_table,
    quarantined,
)
from regraft.validate.raw import RawRow, parsed
from regraft.validate.report import ExpectationResult, FileResult, TimeRange, ValidateReport
from regraft.validate.seen import Seen
from regraft.validate.source import DataFile, Opened, find_files, read_rows, stamps
from regraft.validate.sources import mappings
from regraft.validate.work import Lookers

log = logging.getLogger("regraft")
_BATCH = 4_096  # rows measured at once,
_BATCH_BYTES = 16_000_000  # or fewer, where they have so many bytes: several batches are under way
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
        DataError: no data file, an unreadable file, files that differ in their columns, or one that changed meanwhile.
        ParamsError: `data` names a column that no file has, or a slice with very many values.
        GateRefused: an expectation of level `block` failed; both folders are written before.
    """
    from regraft.validate.docs import finish
    from regraft.validate.suite import run_suite

    _check_slices(params, data)
    files, ignored = find_files(data.raw, raw_root)
    before = stamps(files)
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
    if params.language is not None:
        from regraft.validate.languages import allowed_codes

        allowed_codes(params.language)  # what is not installed or known is found before anything is read
        tally.counts.other_language = 0
    masker(params)
    schema = ROWS if all(each.data.tools is None for each in read_as.values()) else TOOL_ROWS
    if any(each.preferences for each in read_as.values()):
        schema = PREFERENCES
    with commit_dir(out) as folder:
        with ExitStack() as stack:
            rows = stack.enter_context(ParquetRows(folder / "rows.parquet", schema))
            kept = stack.enter_context(ParquetRows(folder / "quarantine.parquet", QUARANTINE))
            stack.enter_context(_fewer_collections())
            lookers = stack.enter_context(Lookers(Looker(read_as, forgotten, schema), files))
            for file in files:
                _read_file(file, lookers, params.duplicates, longest, tally, rows, kept)
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
            _check_unchanged(before, stamps(find_files(data.raw, raw_root)[0]))
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
    collect_seldom()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _read_file(
    file: DataFile,
    lookers: Lookers,
    duplicates: Literal["keep", "quarantine"],
    longest: int,
    tally: _Tally,
    rows: ParquetRows,
    kept: ParquetRows,
) -> None:
    opened = Opened()
    read = readable = 0
    rows_before, kept_before = rows.count, kept.count
    for batch, looked in lookers.look(file.name, _batched(read_rows(file, longest, opened, parse=False))):
        read += len(batch)
        readable += looked.readable
        again = tally.seen.add(looked.keys)
        twice = [looked.fit[i] for i, each in enumerate(again) if each]
        if twice and duplicates == "quarantine":
            _take_out(file.name, batch, looked, again, lookers)
        rows.add(looked.rows)
        kept.add(looked.kept)
        _count(tally, file.name, looked, twice)
        tally.report_progress()
    opened.judge(read, readable)
    new, bad = rows.count - rows_before, kept.count - kept_before
    tally.files[file.name] = FileResult(sha256=opened.digest, rows=new + bad, quarantined=bad, problem=opened.problem)
    if opened.problem is not None:
        tally.counts.unreadable[file.name] = opened.problem


def _take_out(name: str, batch: list[RawRow], looked: Looked, again: list[bool], lookers: Lookers) -> None:
    """Quarantine the rows that occurred before."""
    by_line = {raw.line: raw for raw in batch}
    first = [i for i, each in enumerate(again) if not each]
    mapping = lookers.looker.mappings[name]
    more = []
    for i, each in enumerate(again):
        if each:
            raw = parsed(by_line[looked.lines[looked.fit[i]]])
            row = quarantined(name, raw, id_of(raw, None, mapping.data), [Reason.DUPLICATE], masker(mapping.params))
            more.append((looked.fit[i], row))
    places = [*looked.reasons, *(place for place, _ in more)]
    looked.reasons = dict(sorted({**looked.reasons, **{place: [Reason.DUPLICATE] for place, _ in more}}.items()))
    both = pa.concat_tables([looked.kept, quarantine_table([row for _, row in more])])
    looked.kept = both.take(pa.array(sorted(range(len(places)), key=places.__getitem__), pa.int64()))
    looked.rows = looked.rows.take(pa.array(first, pa.int64()))
    looked.fit = [looked.fit[i] for i in first]
    looked.slices = {key: [values[i] for i in first] for key, values in looked.slices.items()}


def _count(tally: _Tally, name: str, looked: Looked, twice: list[int]) -> None:
    """Add a batch to the tally; `twice` are the places of the rows that occurred before."""
    counts, number = tally.counts, len(looked.lines)
    counts.rows_in += number
    counts.forgotten += looked.forgotten
    counts.accepted += len(looked.fit)
    counts.duplicates += len(twice)
    for place, reasons in looked.reasons.items():
        counts.reasons.update(reasons)
        for reason in reasons:
            places = tally.places.setdefault(reason, [])
            if len(places) < _PLACES:
                places.append(f"{name}:{looked.lines[place]}")
    for label in looked.labels:
        if len(tally.labels) < _MOST_VALUES:
            tally.labels[label] += 1
    for slice_, values in looked.slices.items():
        counted = counts.slices.setdefault(slice_, Counter())
        counted.update(value for value in values if value is not None)
        if not counted:
            del counts.slices[slice_]
        if len(counted) > _MOST_VALUES:
            raise ParamsError(
                f"data.slices.{slice_} has over {_MOST_VALUES:,} different values; a slice is a small set",
                fix="take it out of `data.slices`, or use a column with fewer values",
            )
    for slice_ in tally.sliced:
        found: list[str | None] = [None] * number
        for place, value in zip(looked.fit, looked.slices.get(slice_, ()), strict=False):
            found[place] = value
        tally.values.setdefault(slice_, []).extend(found)
    times = [each for each in looked.rows["at"].to_pylist() if each is not None]
    if times:
        tally.first = min(times if tally.first is None else [tally.first, *times])
        tally.last = max(times if tally.last is None else [tally.last, *times])

    row_ids: list[Any] = looked.rows["row_id"].to_pylist()
    tally.digest.update("".join(f"{each}\n" for each in row_ids).encode())

    flags = {"accepted": looked.fit, "quarantined": list(looked.reasons), "duplicate": twice}
    flags |= {
        reason.value: [place for place, reasons in looked.reasons.items() if reason in reasons]
        for reason in sorted(tally.watched)
    }
    columns: dict[str, Any] = {column: _flags(places, number) for column, places in flags.items()}
    columns |= {column: found.cast(pa.int8()) for column, found in looked.counted.items()}
    if counts.foreign is not None:
        counts.foreign += looked.counted[FOREIGN].true_count
    if counts.other_language is not None:
        counts.other_language += looked.counted[OTHER_LANGUAGE].true_count
    tally.flags.append(pa.table(columns))


def _flags(places: list[int], rows: int) -> Any:
    import numpy as np

    column = np.zeros(rows, np.int8)
    column[places] = 1
    return pa.array(column)


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
        rows_in_other_languages=counts.other_language,
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


def _check_unchanged(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Refuse rows of files that were written to meanwhile: DVC takes down what is there at the end as what was validated."""
    if other := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
        more = f" and {len(other) - 5:,} more" if len(other) > 5 else ""
        raise DataError(
            f"{', '.join(other[:5])}{more} changed while the data was read; expected files that nobody writes to",
            fix="write new files elsewhere and move them into data/raw when they are whole; run the same command again",
        )


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


def _batched(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.raw)
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
