"""Which training rows come near a held-out one: by MinHash of word pairs, by the bag of words, by long n-grams.

    near          the Jaccard index of the sets of word pairs, estimated by MinHash (Broder, "On the Resemblance and
                  Containment of Documents", 1997) with candidates by locality-sensitive hashing in bands
    reordered     the same words the same number of times, in whatever order
    contaminated  one run of n words in common (Brown et al., arXiv:2005.14165, appendix C)

Everything is over whole batches in numpy; of each row 264 bytes are kept with its keys, on disk. In memory are the held-out
rows' signatures and one shard's. A word is a run of letters and digits after NFC and case folding.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

HASHES, BANDS = 64, 16  # four hashes a band: half of the pairs at an index of 0.5 are candidates, 99 % at 0.7
_CANDIDATES = 64  # held-out rows looked at for each row and band
_WORD = re.compile(r"\w+")
_PAIR = 2
_BLANK = "\0"  # stands for the words that a very short text lacks


def sketch(texts: Sequence[str]) -> tuple["np.ndarray", "np.ndarray"]:
    """Return signatures, uint32 of (texts, HASHES), and a hash of each text's bag of words, uint64.

    Args:
        texts: folded (see `regraft.preprocess.holdout.plain`).
    """
    import numpy as np

    if not texts:
        return np.empty((0, HASHES), np.uint32), np.empty(0, np.uint64)
    words = [_WORD.findall(text) for text in texts]
    bags = np.array([_hash(" ".join(sorted(each))) for each in words], np.uint64)
    flat, lengths = _flat(words, _PAIR)
    shingles, starts = _runs(flat, lengths, _PAIR)
    signatures = np.empty((len(texts), HASHES), np.uint32)
    for i, (factor, term) in enumerate(_permutations()):
        hashed = ((shingles * factor + term) >> np.uint64(32)).astype(np.uint32)
        signatures[:, i] = np.minimum.reduceat(hashed, starts)
    return signatures, bags


def distinct(values: "np.ndarray") -> "np.ndarray":
    """Return the different numbers of an array of one dimension, sorted.

    `numpy.unique` hashes them since 2.3, in a time that grows with the square for what came out of such a table before:
    a second for 10,000 numbers, a hundred for 100,000.
    """
    import numpy as np

    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def grams(texts: Sequence[str], length: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Return hashes of all runs of `length` words, uint64, end to end, and how many each text has."""
    import numpy as np

    words = [_WORD.findall(text) for text in texts]
    long = [i for i, each in enumerate(words) if len(each) >= length]
    counts = np.zeros(len(texts), np.int64)
    if not long:
        return np.empty(0, np.uint64), counts
    flat, lengths = _flat([words[i] for i in long], length)
    runs, _ = _runs(flat, lengths, length)
    counts[long] = lengths - length + 1
    return runs, counts


class HeldOut:
    """The held-out rows, to compare training rows with."""

    def __init__(self, signatures: "np.ndarray", bags: "np.ndarray", threshold: float) -> None:
        import numpy as np

        self._signatures = np.unique(signatures, axis=0) if len(signatures) else signatures
        self._bags = distinct(bags)
        self._threshold = threshold
        keys = _bands(self._signatures)
        self._orders = [np.argsort(keys[:, band], kind="stable") for band in range(BANDS)]
        self._keys = [keys[order, band] for band, order in enumerate(self._orders)]

    def near(self, signatures: "np.ndarray", bags: "np.ndarray") -> "np.ndarray":
        """Say which rows come near a held-out one: bool of (rows,)."""
        import numpy as np

        found = np.isin(bags, self._bags)
        if not len(self._signatures):
            return found
        keys = _bands(signatures)
        for band in range(BANDS):
            rows = np.flatnonzero(~found)
            low = np.searchsorted(self._keys[band], keys[rows, band], "left")
            high = np.searchsorted(self._keys[band], keys[rows, band], "right")
            for step in range(_CANDIDATES):
                some = (low + step < high) & ~found[rows]
                if not some.any():
                    break
                other = self._orders[band][low[some] + step]
                same = (signatures[rows[some]] == self._signatures[other]).mean(axis=1)
                found[rows[some][same >= self._threshold]] = True
        return found


def band(signatures: "np.ndarray", number: int) -> "np.ndarray":
    """Return a hash of one band of each signature, uint64."""
    size = HASHES // BANDS
    return _hashed(signatures[:, number * size : (number + 1) * size].astype("uint64"))


def _bands(signatures: "np.ndarray") -> "np.ndarray":
    """Return a hash of each band, uint64 of (rows, BANDS)."""
    import numpy as np

    return _hashed(signatures.reshape(len(signatures), BANDS, HASHES // BANDS).astype(np.uint64))


def _hashed(parts: "np.ndarray") -> "np.ndarray":
    """Return a hash of the last axis."""
    import numpy as np

    hashed = np.zeros(parts.shape[:-1], np.uint64)
    for i in range(parts.shape[-1]):
        hashed = (hashed ^ parts[..., i]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return hashed


def _flat(words: Sequence[Sequence[str]], least: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Return the hashes of all words, and each text's number of words; each text has at least `least`."""
    import numpy as np

    padded = [each if len(each) >= least else [*each, *[_BLANK] * (least - len(each))] for each in words]
    lengths = np.array([len(each) for each in padded], np.int64)
    flat = np.fromiter((_hash(word) for each in padded for word in each), np.uint64, int(lengths.sum()))
    return flat, lengths


def _runs(flat: "np.ndarray", lengths: "np.ndarray", size: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Return a hash of each run of `size` words within a text, and where each text's runs start."""
    import numpy as np

    count = len(flat) - size + 1
    runs = np.zeros(count, np.uint64)
    for i in range(size):
        runs = (runs ^ flat[i : i + count]) * np.uint64(0xBF58476D1CE4E5B9)
        runs ^= runs >> np.uint64(31)
    ends = np.cumsum(lengths)
    inside = np.ones(len(flat), bool)
    for i in range(1, size):
        inside[ends - i] = False  # a run that would go over the end of its text
    counts = lengths - size + 1
    return runs[inside[:count]], np.cumsum(counts) - counts


@lru_cache(maxsize=1 << 18)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _permutations() -> list[tuple["np.uint64", "np.uint64"]]:
    import numpy as np

    return [(np.uint64(_hash(f"factor {i}") | 1), np.uint64(_hash(f"term {i}"))) for i in range(HASHES)]
