"""Duplicates are told as a set would."""

import hashlib
import random

from regraft.validate.seen import Seen


def test_keys_are_remembered_as_in_a_set_whatever_the_batches() -> None:
    dice, seen, known = random.Random(0), Seen(), set()
    for _ in range(200):
        keys = [hashlib.sha256(str(dice.randrange(3000)).encode()).digest()[:16] for _ in range(dice.randrange(60))]
        expected = []
        for key in keys:
            expected.append(key in known)
            known.add(key)
        assert seen.add(keys) == expected
    assert len(seen) == len(known)


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    seen = Seen()
    assert seen.add([b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\0" * 16]) == [False, False, False, True]
    assert seen.add([b"\1" + b"\0" * 15]) == [True]
