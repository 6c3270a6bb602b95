"""What the set of rows must fulfil, as plain data: measured here from counts, judged in `suite.py` by Great Expectations.

Each is an aggregate over one of two frames of measured columns:

    rows    one line for each row read: 0/1 columns `accepted`, `quarantined`, `duplicate` and one for each reason that
            has an expectation; for each slice that has one, `<slice>` (its value) and `rows of <slice>` (accepted rows of
            that value), both empty for a row that was not accepted
            For each source that has one, 0/1 `from <source>`, empty for a row that was not accepted; 0/1 `foreign` and
            `other_language`.
    files   one line for each file: 0/1 column `unreadable`
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from regraft.validate.params import AtMost, Expectations, Level, Reason

Check = Literal["sum at least", "sum at most", "mean at least", "mean at most", "minimum at least", "contains"]


@dataclass
class Counts:
    """What was counted while reading."""

    rows_in: int = 0
    accepted: int = 0
    duplicates: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    slices: dict[str, Counter[str]] = field(default_factory=dict)
    foreign: int | None = None
    """Rows with too many letters of other scripts; None where that is not looked at."""
    other_language: int | None = None
    """Rows in other languages; None where that is not looked at."""
    forgotten: int = 0
    """Rows left out because they are on the list of what is forgotten; not among `rows_in`."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files that cannot be read, with the reason."""

    @property
    def quarantined(self) -> int:
        """Rows not accepted."""
        return self.rows_in - self.accepted


@dataclass(frozen=True)
class Expected:
    """One expectation, with what was measured."""

    name: str
    level: Level
    frame: Literal["rows", "files"]
    check: Check
    column: str
    threshold: float
    measured: float
    rows: int
    what: str
    """What is measured, in words."""
    values: tuple[str, ...] = ()
    """For `contains`: the values that must occur."""
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether our own counts fulfil it."""
        if self.check.endswith("at least"):
            return self.measured >= self.threshold
        return self.measured <= self.threshold

    @property
    def sentence(self) -> str:
        """The expectation and what was measured, without anything that came from the data."""
        limit = "at least" if self.check.endswith("at least") else "at most"
        return f"{self.what}: {self.measured:g}, expected {limit} {self.threshold:g} ({self.level})"


def expected(params: Expectations, counts: Counts) -> list[Expected]:
    """Return every expectation of section `validate`, in the order of the report."""

    def share(name: str, limit: AtMost, column: str, count: int, what: str) -> Expected:
        measured = count / counts.rows_in if counts.rows_in else 1.0
        return Expected(name, limit.level, "rows", "mean at most", column, limit.share, measured, count, what)

    unreadable = "; ".join(f"{name}: {problem}" for name, problem in sorted(counts.unreadable.items()))
    return [
        Expected(
            "rows",
            params.rows.level,
            "rows",
            "sum at least",
            "accepted",
            params.rows.minimum,
            counts.accepted,
            counts.accepted,
            "rows accepted",
        ),
        share("quarantined", params.quarantined, "quarantined", counts.quarantined, "share of rows quarantined"),
        share("duplicates", params.duplicates, "duplicate", counts.duplicates, "share of rows that occurred before"),
        Expected(
            "files",
            params.files.level,
            "files",
            "sum at most",
            "unreadable",
            params.files.unreadable,
            len(counts.unreadable),
            len(counts.unreadable),
            "files that cannot be read",
            detail=unreadable,
        ),
        *(
            share(
                f"reasons.{reason}",
                params.reasons[reason],
                reason.value,
                counts.reasons[reason],
                f"share of rows: {reason}",
            )
            for reason in Reason
            if reason in params.reasons
        ),
        *(each for name in sorted(params.slices) for each in _of_slice(name, params, counts.slices.get(name, {}))),
        *(each for name in sorted(params.sources) for each in _of_source(name, params, counts)),
        *(
            []
            if counts.foreign is None
            else [share("scripts", params.scripts, "foreign", counts.foreign, "share of rows in other scripts")]
        ),
        *(
            []
            if counts.other_language is None
            else [
                share(
                    "language",
                    params.language,
                    "other_language",
                    counts.other_language,
                    "share of rows in other languages",
                )
            ]
        ),
    ]


def _of_slice(name: str, params: Expectations, counted: Mapping[str, int]) -> list[Expected]:
    limit = params.slices[name]
    few = {value: count for value, count in sorted(counted.items()) if count < limit.minimum}
    found = [
        Expected(
            f"slices.{name}",
            limit.level,
            "rows",
            "minimum at least",
            f"rows of {name}",
            limit.minimum,
            min(counted.values(), default=0),
            sum(few.values()),
            f"accepted rows of the rarest value of {name}",
            detail=_listed([f"{value} ({count})" for value, count in few.items()]),
        )
    ]
    if limit.values:
        absent = [value for value in limit.values if value not in counted]
        found.append(
            Expected(
                f"slices.{name}.values",
                limit.level,
                "rows",
                "contains",
                name,
                0,
                len(absent),
                0,
                f"values of {name} that do not occur",
                values=tuple(limit.values),
                detail=_listed(absent),
            )
        )
    return found


def _of_source(name: str, params: Expectations, counts: Counts) -> list[Expected]:
    limit = params.sources[name]
    rows = counts.slices.get("source", Counter())[name]
    measured = rows / counts.accepted if counts.accepted else 0.0
    column, what = f"from {name}", f"share of accepted rows from {name}"
    bounds: list[tuple[str, Check, float]] = []
    if limit.minimum > 0:
        bounds.append(("minimum", "mean at least", limit.minimum))
    if limit.maximum < 1:
        bounds.append(("maximum", "mean at most", limit.maximum))
    return [
        Expected(f"sources.{name}.{bound}", limit.level, "rows", check, column, threshold, measured, rows, what)
        for bound, check, threshold in bounds
    ]


def _listed(values: list[str]) -> str:
    return ", ".join(value if len(value) <= 60 else f"{value[:57]}..." for value in values[:10]) + (
        f" and {len(values) - 10} more" if len(values) > 10 else ""
    )
