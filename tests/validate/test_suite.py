from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from regraft.validate.expectations import Expected
from regraft.validate.suite import run_suite

FRAMES = {
    "rows": pa.table(
        {
            "accepted": pa.array([1, 1, 1, 0], pa.int8()),
            "quarantined": pa.array([0, 0, 0, 1], pa.int8()),
            "kind": pa.array(["a", "a", "b", None]),
            "rows of kind": pa.array([2.0, 2.0, 1.0, None]),
        }
    ),
    "files": pa.table({"unreadable": pa.array([0, 1], pa.int8())}),
}
ROWS = Expected("rows", "block", "rows", "sum at least", "accepted", 3, 3, 3, "rows")


def test_every_kind_of_check_agrees_with_our_own_count_on_both_sides_of_its_limit(tmp_path: Path) -> None:
    wanted = []
    for at, beyond, each in (
        (3, 4, ROWS),
        (1, 0, Expected("files", "warn", "files", "sum at most", "unreadable", 0, 1, 1, "files")),
        (0.25, 0.24, Expected("bad", "warn", "rows", "mean at most", "quarantined", 0, 0.25, 1, "share")),
        (1, 2, Expected("kind", "warn", "rows", "minimum at least", "rows of kind", 0, 1, 1, "rows of kind")),
    ):
        wanted += [
            replace(each, name=f"{each.name} at", threshold=at),
            replace(each, name=f"{each.name} x", threshold=beyond),
        ]
    contains = Expected("has at", "warn", "rows", "contains", "kind", 0, 0, 0, "values", values=("a", "b"))
    wanted += [contains, replace(contains, name="has x", measured=1, values=("a", "c"))]
    passed = run_suite(wanted, FRAMES, tmp_path)
    assert passed == {each.name: each.holds for each in wanted}
    assert passed == {each.name: each.name.endswith(" at") for each in wanted}


@pytest.mark.parametrize("column", ["no such column", "kind"])
def test_an_expectation_that_raises_has_not_passed(tmp_path: Path, column: str) -> None:
    passed = run_suite([ROWS, replace(ROWS, name="broken", column=column)], FRAMES, tmp_path)
    assert passed == {"rows": True, "broken": False}


def test_an_expectation_that_was_not_judged_has_not_passed(tmp_path: Path) -> None:
    lost = replace(ROWS, name="lost", frame="files")
    assert run_suite([ROWS, lost], {"rows": FRAMES["rows"]}, tmp_path) == {"rows": True, "lost": False}
