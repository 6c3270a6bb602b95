"""Errors: one hierarchy, documented, picklable (they cross process borders), each with its exit code."""

import inspect
import pickle
import re

import pytest

from regraft import errors
from regraft.errors import Exit, RegraftError, StageFailed

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, RegraftError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_its_message_fix_and_exit_code(kind: type[RegraftError]) -> None:
    error = kind("found 1, expected 2", fix="do it again")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.message, again.fix, again.exit_code) == (error.message, error.fix, error.exit_code)
    assert str(again) == "found 1, expected 2\n  next: do it again"


def test_a_failed_stage_carries_its_own_exit_code() -> None:
    error = pickle.loads(pickle.dumps(StageFailed("no", stage="train", code=Exit.REFUSED)))
    assert (error.stage, error.exit_code) == ("train", 3)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(
        r"[├└]── (\w+)(?: \((\w+)\))? +(\d|\*)|^    (RegraftError) +exit code (\d)", errors.__doc__ or "", re.M
    )
    documented = {name or root: code or own for name, _, own, root, code in drawn}
    assert set(documented) == {kind.__name__ for kind in ALL}
    for kind in ALL:
        if kind is not StageFailed:
            assert int(documented[kind.__name__]) == kind.exit_code, kind
    for name, standard, *_ in drawn:
        if standard:
            assert standard in [base.__name__ for base in getattr(errors, name).__mro__]
