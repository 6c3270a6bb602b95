"""Older rows are left out by a chance that falls with age, the same ones each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.preprocess.holdout import Fate
from regraft.preprocess.params import HoldoutParams, PreprocessParams, ReplayParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.replay import thin

DAYS = ["2026-09-01", "2026-08-02", "2026-07-03", "2025-01-01T10:00:00"]
COUNT = 4000


def _thinned(half_life: float, floor: float, day: str = "2026-09-01") -> np.ndarray:
    fates = np.zeros(COUNT * len(DAYS) + 1, np.int8)
    times = np.array([each.encode() for each in DAYS for _ in range(COUNT)] + [day.encode()], "S32")
    ids = np.random.default_rng(0).integers(0, 2**64, len(fates), dtype=np.uint64)
    thin(fates, times, ids, ReplayParams(half_life=half_life, floor=floor))
    return fates[:-1].reshape(len(DAYS), COUNT)


def test_a_row_stays_by_half_for_each_half_life_and_never_under_the_floor() -> None:
    shares = (_thinned(30, 0.1) == Fate.TRAIN).mean(axis=1)

    assert shares[0] == 1
    assert shares[1:] == pytest.approx([0.5, 0.25, 0.1], abs=0.03)


def test_what_stays_later_stayed_before() -> None:
    now, later = _thinned(30, 0.0), _thinned(30, 0.0, day="2026-10-01")

    assert not ((later == Fate.TRAIN) & (now != Fate.TRAIN)).any()
    assert (later == Fate.TRAIN).sum() < (now == Fate.TRAIN).sum()


def test_rows_without_a_time_and_rows_with_another_fate_are_left_as_they_are() -> None:
    fates = np.array([Fate.TRAIN, Fate.HOLDOUT, Fate.LEAKED, Fate.TRAIN], np.int8)
    times = np.array([b"~", b"2020-01-01", b"2020-01-01", b"2026-01-01"], "S32")
    thin(fates, times, np.full(4, 2**64 - 1, np.uint64), ReplayParams(half_life=1, floor=0))

    assert fates.tolist() == [Fate.TRAIN, Fate.HOLDOUT, Fate.LEAKED, Fate.TRAIN]


def test_the_report_counts_what_was_left_out_and_the_holdout_keeps_its_rows(
    tokenizer_base: Path, write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    dated = [{**row, "at": "2026-09-01" if index % 2 else "2026-06-03"} for index, row in enumerate(rows)]
    written = write_rows(dated)
    reports = [
        preprocess(
            PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1), replay=replay),
            base=tokenizer_base,
            rows=written,
            out=tmp_path / str(replay is None),
        )
        for replay in (None, ReplayParams(half_life=30, floor=0.05))
    ]
    every, thinned = (report.counts for report in reports)

    assert every.aged == 0
    assert thinned.aged > 0.3 * every.train
    assert thinned.train == every.train - thinned.aged
    assert thinned.holdout == every.holdout
