"""How much each source is trained on: a share of its rows, all of them, or some of them more than once; and a cap.

What becomes of a row is decided by its own id, which is as good as random: a row that is added, or another source, changes
nothing else, but that under a cap a new row may take the place of one other (the rows with the lowest hashes stay).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regraft.errors import ParamsError
from regraft.preprocess.holdout import Fate
from regraft.preprocess.params import MixParams

if TYPE_CHECKING:
    import numpy as np

SLICE = "source"
"""The slice that names a row's source; `data.sources` makes it."""


def weigh(
    fates: "np.ndarray", ids: "np.ndarray", origins: Sequence["np.ndarray"], params: Mapping[str, MixParams]
) -> "np.ndarray":
    """Set the fates of training rows that are left out, in place, and return how often each row is trained on.

    Args:
        fates: int8, of all rows.
        ids: uint64, as good as random.
        origins: the name of each row's source as UTF-8, shard by shard.
        params: weights and caps by source; others are trained on once.

    Returns:
        Copies of each row, uint8; of rows that are not trained on 1.

    Raises:
        ParamsError: no row is from a source that is named.
    """
    import numpy as np

    copies = np.ones(len(fates), np.uint8)
    # Not the ids themselves: `replay` draws by those, and its draw and this one are to be independent.
    chances = (ids * np.uint64(0x9E3779B97F4A7C15)) ^ (ids >> np.uint64(32))
    chances = (chances * np.uint64(0xD6E8FEB86659FD93)).astype(np.float64) / 2.0**64
    known = sorted({name.decode() for some in origins for name in np.unique(some).tolist()} - {""})
    if unknown := sorted(set(params) - set(known)):
        raise ParamsError(
            f"preprocess.mix names {', '.join(unknown)}, but rows are from {', '.join(known) or 'no source'}",
            fix="name sources of `data.sources` (`other` is what is in none)",
        )
    for name, mix in params.items():
        encoded = name.encode()
        own = np.concatenate([some == encoded for some in origins]) & (fates == Fate.TRAIN)
        (where,) = np.nonzero(own)
        times = int(mix.weight) + (chances[where] < mix.weight - int(mix.weight))
        kept = where[times > 0]
        copies[kept] = times[times > 0]
        if mix.cap is not None and len(kept) > mix.cap:
            kept = kept[np.lexsort((ids[kept], chances[kept]))[: mix.cap]]
        out = np.setdiff1d(where, kept)
        fates[out], copies[out] = Fate.SAMPLED, 1
    return copies
