"""How much of older rows is trained on again: a share that falls with age.

Training on new rows alone forgets what older ones taught; training on all of them costs more with every batch. So an
older row stays with a chance that halves with each half-life (experience replay, arXiv:1811.11682), decided by its own
id: the same data leave out the same rows, and the rows of a later run are a subset of those of an earlier one.
"""

from typing import TYPE_CHECKING

from regraft.preprocess.holdout import Fate
from regraft.preprocess.params import ReplayParams

if TYPE_CHECKING:
    import numpy as np


def thin(fates: "np.ndarray", times: "np.ndarray", ids: "np.ndarray", params: ReplayParams) -> None:
    """Set the fate of training rows that are left out for their age, in place.

    Args:
        fates: int8, as `decide` left them.
        times: ISO dates or times as bytes; `~` where a row has none: such a row stays.
        ids: uint64, as good as random.
        params: half-life and floor.
    """
    import numpy as np

    dated = times != b"~"
    if not dated.any():
        return
    days = np.zeros(len(times), np.int64)
    days[dated] = times[dated].astype("S10").astype("U10").astype("datetime64[D]").astype(np.int64)
    ages = (days[dated].max() - days).clip(min=0)
    weights = np.where(dated, np.maximum(params.floor, 0.5 ** (ages / params.half_life)), 1.0)
    chances = ids.astype(np.float64) / 2.0**64
    fates[(fates == Fate.TRAIN) & (weights < 1) & (chances >= weights)] = Fate.AGED
