"""The counts of the report."""

import pytest
from pydantic import ValidationError

from regraft.preprocess.report import Counts


def test_counts_that_do_not_add_up_are_refused() -> None:
    parts = {"train": 5, "holdout": 2, "deduplicated": 1, "leaked": 1, "too_long": 1, "nothing_to_train": 1}
    assert Counts(rows_in=11, **parts).rows_in == 11
    with pytest.raises(ValidationError, match="the counts add up to 11, but 12 rows came in"):
        Counts(rows_in=12, **parts)
