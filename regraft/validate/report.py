"""What `validate` found: the document that the data gate, DVC and MLflow read."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from regraft.late import LateFields
from regraft.report import Report
from regraft.validate.params import Level


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpectationResult(_Part):
    """One expectation of the set of rows; `passed` is Great Expectations' answer, `measured` is ours."""

    name: str
    level: Level
    passed: bool
    measured: float
    threshold: float
    rows: int
    """Rows concerned (files for `files`): those too many, or those that there are."""
    detail: str = ""


class FileResult(_Part):
    """One input file."""

    sha256: str
    rows: int
    quarantined: int
    problem: str | None = None
    """Why the file counts as unreadable."""


class TimeRange(_Part):
    """First and last `at` of the accepted rows; null where no row has one."""

    first: str | None = None
    last: str | None = None


class ValidateReport(LateFields, Report):
    """Counts and judgements; the same input and parameters give the same bytes."""

    LATE: ClassVar[frozenset[str]] = frozenset({"rows_forgotten", "rows_in_other_scripts", "rows_in_other_languages"})

    rows_in: int
    rows_out: int
    rows_quarantined: int
    rows_duplicate: int
    """Rows whose messages occurred before; with `duplicates: keep` they are among `rows_out`."""
    quarantined_by_reason: dict[str, int]
    """A row with several reasons counts in each."""
    unknown_labels: dict[str, int]
    """The most frequent unknown labels, at most 20, cut to 40 characters and masked."""
    expectations: list[ExpectationResult]
    passed: bool
    """No expectation of level `block` failed."""
    slices: dict[str, dict[str, int]]
    """Accepted rows by slice and value."""
    time: TimeRange
    files: dict[str, FileResult]
    ignored: list[str]
    """Files of a folder that were left out by name (README.md, .gitignore, ...)."""
    rows_forgotten: int = 0
    """Rows left out because `regraft data forget` named them: in neither file, and no word of them kept. Left out if 0."""
    rows_in_other_scripts: int | None = None
    """Rows with more letters of other scripts than `validate.scripts` allows; left out where that is not looked at."""
    rows_in_other_languages: int | None = None
    """Rows in other languages than `validate.language` allows; left out where that is not looked at."""
    data_digest: str
    """sha256 over the accepted rows' `row_id`s, one a line, in order: moving rows between files changes nothing."""

    @model_validator(mode="after")
    def _nothing_is_lost(self) -> Self:
        if self.rows_in != self.rows_out + self.rows_quarantined + self.rows_forgotten:
            found = f"{self.rows_in} in, {self.rows_out} out, {self.rows_quarantined} quarantined"
            found += f", {self.rows_forgotten} forgotten"
            raise ValueError(f"rows in = rows out + rows quarantined + rows forgotten, found {found}")
        if self.passed != all(each.passed for each in self.expectations if each.level == "block"):
            raise ValueError("`passed` exactly when no expectation of level `block` failed")
        return self
