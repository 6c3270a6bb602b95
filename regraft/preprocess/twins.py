"""Near duplicates among the training rows: of rows that are nearly the same, the earliest stays.

Rows are compared by all that is said in them: word pairs, MinHash, candidates by bands as in `near.py`. A row is left out if it
comes near one that *stays*, so that no chain of small differences takes a row away that is like none that is left. With each
of its bands a row is compared with the eight before it and the first of those that share the band; where thousands share
one (data made from templates), some twins are not seen. Signatures lie on disk; in memory are some 40 bytes for each row.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.failpoints import failpoint
from regraft.preprocess.holdout import Fate
from regraft.preprocess.keys import load_near
from regraft.preprocess.near import BANDS, HASHES, band, distinct

if TYPE_CHECKING:
    import numpy as np

_BEFORE = 8  # rows of one band that each is compared with
_CHUNK = 1 << 16  # rows, or pairs, at once
_SCRATCH = ".twins-"


def drop_twins(
    threshold: float, folders: Sequence[Path], fates: "np.ndarray", times: "np.ndarray", ids: "np.ndarray"
) -> None:
    """Set the fates of training rows that come near an earlier one that stays, in place.

    Args:
        threshold: the Jaccard index, estimated, from which rows are near; 0.4 to 1.
        folders: what was kept of each shard, in the order of the rows; `whole` are the signatures.
        fates: of all rows, int8.
        times: of all rows, as bytes; the earliest stays, of those the one with the lowest id.
        ids: of all rows, uint64.
    """
    import numpy as np

    (train,) = np.nonzero(fates == Fate.TRAIN)
    if len(train) < 2 or not folders:
        return
    train = train[np.lexsort((ids[train], times[train]))]
    rank = np.full(len(fates), -1, np.int64)
    rank[train] = np.arange(len(train))
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folders[0].parent) as scratch:
        signatures = np.memmap(Path(scratch) / "signatures", np.uint32, "w+", shape=(len(train), HASHES))
        at = 0
        for folder in folders:
            own = load_near(folder)["whole"]
            places = rank[at : at + len(own)]
            signatures[places[places >= 0]] = own[places >= 0]
            at += len(own)
        failpoint("preprocess.twins")
        found = np.empty(0, np.uint64)
        for number in range(BANDS):
            near = [_near(signatures, *pair, threshold) for pair in _pairs(signatures, number)]
            found = distinct(np.concatenate([found, *near]))
    gone = np.zeros(len(train), bool)
    for later, earlier in zip((found >> np.uint64(32)).tolist(), (found & np.uint64(0xFFFFFFFF)).tolist(), strict=True):
        if not gone[earlier]:  # in order of rank: what becomes of the earlier one is settled
            gone[later] = True
    fates[train[gone]] = Fate.NEAR_DUPLICATE


def sweep(cache: Path) -> None:
    """Remove signatures that killed runs left beside the folders; only where the stage's lock says that none is running."""
    for left in cache.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def _pairs(signatures: "np.ndarray", number: int) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Yield (later, earlier) rows that share a band."""
    import numpy as np

    size = len(signatures)
    keys = np.concatenate([band(np.asarray(signatures[i : i + _CHUNK]), number) for i in range(0, size, _CHUNK)])
    order = np.argsort(keys, kind="stable")  # within a band the earliest comes first
    keys = keys[order]
    for step in range(1, min(_BEFORE, size - 1) + 1):
        (same,) = np.nonzero(keys[step:] == keys[:-step])
        if not len(same):
            return
        yield order[same + step], order[same]
    new = np.ones(size, bool)
    new[1:] = keys[1:] != keys[:-1]
    first = np.maximum.accumulate(np.where(new, np.arange(size), 0))
    (far,) = np.nonzero(np.arange(size) - first > _BEFORE)
    yield order[far], order[first[far]]


def _near(signatures: "np.ndarray", later: "np.ndarray", earlier: "np.ndarray", threshold: float) -> "np.ndarray":
    """Return the pairs that are near, each as one number: the later row's rank, then the earlier one's."""
    import numpy as np

    kept = [np.empty(0, np.uint64)]
    for i in range(0, len(later), _CHUNK):
        one, other = later[i : i + _CHUNK], earlier[i : i + _CHUNK]
        same = (signatures[one] == signatures[other]).mean(axis=1) >= threshold
        kept.append((one[same].astype(np.uint64) << np.uint64(32)) | other[same].astype(np.uint64))
    return np.concatenate(kept)
