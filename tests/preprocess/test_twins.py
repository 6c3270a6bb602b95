"""Near duplicates among the training rows: the earliest stays, and what is left out is near one that stays."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.preprocess.holdout import Fate, plain
from regraft.preprocess.near import sketch
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport
from regraft.preprocess.twins import drop_twins

WORDS = [f"w{i}" for i in range(400)]


def text(dice: random.Random, length: int = 40) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(length))


def edited(words: str, dice: random.Random, changes: int) -> str:
    some = words.split()
    for _ in range(changes):
        some[dice.randrange(len(some))] = dice.choice(WORDS)
    return " ".join(some)


def fates_of(texts: list[str], root: Path, threshold: float = 0.7, times: list[str] | None = None) -> np.ndarray:
    """As the stage does it, with two shards."""
    root.mkdir()
    folders = []
    half = len(texts) // 2
    for i, some in enumerate((texts[:half], texts[half:])):
        folders.append(root / str(i))
        folders[-1].mkdir()
        np.savez(folders[-1] / "near.npz", whole=sketch([plain(each) for each in some])[0])
    fates = np.zeros(len(texts), np.int8)
    at = np.array(times or ["~"] * len(texts), "S10")
    drop_twins(threshold, folders, fates, at, np.arange(len(texts), dtype=np.uint64))
    assert sorted(path.name for path in root.iterdir()) == ["0", "1"]
    return fates


def test_copies_with_small_edits_go_and_the_first_stays_and_others_too(tmp_path: Path) -> None:
    dice = random.Random(0)
    originals = [text(dice) for _ in range(300)]
    copies = [edited(each, dice, 1) for each in originals]
    fates = fates_of([*originals, *copies], tmp_path / "one")
    assert (fates[:300] == Fate.TRAIN).all()
    assert (fates[300:] == Fate.NEAR_DUPLICATE).mean() >= 0.98
    others = fates_of([text(dice) for _ in range(600)], tmp_path / "two")
    assert (others == Fate.TRAIN).all()


def test_the_earliest_stays_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    one = text(random.Random(1))
    fates = fates_of([one, one, one, one], tmp_path / "x", times=["2026-09-03", "~", "2026-09-01", "2026-09-02"])
    assert fates.tolist() == [Fate.NEAR_DUPLICATE, Fate.NEAR_DUPLICATE, Fate.TRAIN, Fate.NEAR_DUPLICATE]


def test_of_a_chain_of_small_changes_each_row_that_goes_is_near_one_that_stays(tmp_path: Path) -> None:
    dice = random.Random(2)
    chain = [text(dice, 60)]
    for _ in range(60):
        chain.append(edited(chain[-1], dice, 1))
    fates = fates_of(chain, tmp_path / "x")
    pairs = [set(pairwise(each.split())) for each in chain]
    stay = [i for i in range(len(chain)) if fates[i] == Fate.TRAIN]
    assert 3 <= len(stay) <= 30
    for i in set(range(len(chain))) - set(stay):
        assert max(len(pairs[i] & pairs[j]) / len(pairs[i] | pairs[j]) for j in stay if j < i) > 0.5  # 0.7, estimated


def test_thousands_of_equal_rows_leave_one(tmp_path: Path) -> None:
    fates = fates_of(["the same words again and again " * 3] * 3_000, tmp_path / "x")
    assert (fates == Fate.TRAIN).sum() == 1


def test_the_stage_leaves_them_out_and_counts_them_and_by_default_does_not(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    dice = random.Random(3)

    def row(words: str, side: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
        return {"messages": messages, "slices": {"side": side}}

    originals = [text(dice) for _ in range(20)]
    rows = [row(each, "train") for each in originals] + [row(each + " please", "train") for each in originals[:5]]
    rows += [row(each + " now", "held") for each in originals[5:8]]
    folder = write_rows(rows)

    def run(name: str, near: float | None) -> PreprocessReport:
        holdout = {"share": 0, "always": {"side": "held"}}
        params = {"max_length": 512, "holdout": holdout, "near_duplicates": near}
        return preprocess(
            PreprocessParams.model_validate(params), base=tokenizer_base, rows=folder, out=tmp_path / name
        )

    assert run("plain", None).counts.near_duplicates == 0
    found = run("near", 0.8).counts
    assert (found.near_duplicates, found.train, found.holdout) == (5, 20, 3)


@pytest.mark.parametrize("value", [0.2, 1.5])
def test_a_threshold_that_finds_everything_or_nothing_is_a_mistake(value: float) -> None:
    with pytest.raises(ValueError, match="near_duplicates"):
        PreprocessParams(near_duplicates=value)
