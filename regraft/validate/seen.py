"""Which keys occurred before: 16 bytes of memory for each, where a set of Python's takes a hundred."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Seen:
    """Keys of 16 bytes in sorted arrays, each at least twice as long as the next (O'Neil et al., "The LSM-tree", 1996)."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    def add(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether it occurred before, in this batch or an earlier one, and remember it."""
        import numpy as np

        if not keys:
            return []
        new = np.frombuffer(b"".join(keys), "V16")
        words = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
        order = np.lexsort((words[:, 1], words[:, 0]))
        new = new[order]
        again = np.zeros(len(new), bool)
        again[1:] = new[1:] == new[:-1]  # the sort is stable: the first of equal keys stays the first
        text = np.frombuffer(new.tobytes(), "S16")
        for old in self._sorted:
            at = np.minimum(np.searchsorted(old, text), len(old) - 1)
            again |= old[at] == text
        found = np.empty(len(new), bool)
        found[order] = again
        self._merge(text[~again])
        return [bool(each) for each in found]

    def _merge(self, new: "np.ndarray") -> None:
        import numpy as np

        while self._sorted and len(self._sorted[-1]) < 2 * len(new):
            both = np.concatenate([self._sorted.pop(), new])
            both.sort(kind="stable")
            new = both
        if len(new):
            self._sorted.append(new)
