"""Leaving out the training rows that come too near the holdout; shard by shard, by what was kept of each (`near.py`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.preprocess.holdout import Fate
from regraft.preprocess.keys import load_near
from regraft.preprocess.near import HeldOut, distinct
from regraft.preprocess.params import LeakParams

if TYPE_CHECKING:
    import numpy as np


def keep_apart(params: LeakParams, folders: Sequence[Path], fates: "np.ndarray") -> None:
    """Set the fates of training rows that come too near a held-out one, in place.

    Args:
        params: how near is too near.
        folders: what was kept of each shard, in the order of the rows.
        fates: of all rows, as `decide` left them.
    """
    if params.near is not None:
        _near(params.near, folders, fates)
    if params.run is not None:
        _contaminated(folders, fates)


def decontaminate(known: Mapping[str, "np.ndarray"], folders: Sequence[Path], fates: "np.ndarray") -> dict[str, int]:
    """Set the fates of training rows that share a run of words with a benchmark, in place.

    Args:
        known: the sorted hashes of each benchmark's runs.
        folders: what was kept of each shard, in the order of the rows.
        fates: of all rows.

    Returns:
        Rows that share a run with each benchmark; a row may share some with several.
    """
    hits = dict.fromkeys(known, 0)
    at = 0
    for folder in folders:
        found = load_near(folder)
        own = fates[at : at + len(found["counts"])]
        train = own == Fate.TRAIN
        for name, runs in known.items():
            touched = _touched(found, runs) & train
            hits[name] += int(touched.sum())
            own[touched] = Fate.DECONTAMINATED
        at += len(own)
    return hits


def _touched(found: Mapping[str, "np.ndarray"], known: "np.ndarray") -> "np.ndarray":
    """Say which rows of a shard have a run that is known."""
    import numpy as np

    counts = found["counts"]
    touched = np.zeros(len(counts), bool)
    touched[np.repeat(np.arange(len(counts)), counts)[np.isin(found["runs"], known)]] = True
    return touched


def _near(threshold: float, folders: Sequence[Path], fates: "np.ndarray") -> None:
    import numpy as np

    signatures, bags, at = [], [], 0
    for folder in folders:
        found = load_near(folder)
        held = fates[at : at + len(found["bags"])] == Fate.HOLDOUT
        signatures.append(found["signatures"][held])
        bags.append(found["bags"][held])
        at += len(held)
    held_out = HeldOut(np.concatenate(signatures), np.concatenate(bags), threshold)
    at = 0
    for folder in folders:
        found = load_near(folder)
        own = fates[at : at + len(found["bags"])]
        (train,) = np.nonzero(own == Fate.TRAIN)
        own[train[held_out.near(found["signatures"][train], found["bags"][train])]] = Fate.NEAR
        at += len(own)


def _contaminated(folders: Sequence[Path], fates: "np.ndarray") -> None:
    import numpy as np

    runs, at = [np.empty(0, np.uint64)], 0
    for folder in folders:
        found = load_near(folder)
        held = fates[at : at + len(found["counts"])] == Fate.HOLDOUT
        runs.append(distinct(found["runs"][np.repeat(held, found["counts"])]))
        at += len(held)
    known = distinct(np.concatenate(runs))
    at = 0
    for folder in folders:
        found = load_near(folder)
        own = fates[at : at + len(found["counts"])]
        own[_touched(found, known) & (own == Fate.TRAIN)] = Fate.CONTAMINATED
        at += len(own)
