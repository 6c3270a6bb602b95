"""Blocks of conversations."""

import random

import numpy as np
import pytest

from regraft.preprocess.pack import Documents, pack_blocks, plan_blocks


def test_every_conversation_is_in_one_block_and_no_block_is_too_long() -> None:
    dice = random.Random(0)
    for _ in range(50):
        block_length = dice.randrange(1, 300)
        lengths = [dice.randint(1, block_length) for _ in range(dice.randrange(200))]
        blocks = plan_blocks(lengths, block_length)
        assert sorted(i for members in blocks for i in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= block_length for members in blocks)


def test_each_conversation_goes_where_the_least_room_is_left_over() -> None:
    assert plan_blocks([4, 6, 3, 7, 10, 5, 5], 10) == [[0, 1], [2, 3], [4], [5, 6]]
    # 6 and 5 leave rooms of 4 and 5: the 4 takes the tighter one
    assert plan_blocks([6, 5, 4], 10) == [[0, 2], [1]]


def test_short_conversations_fill_blocks_nearly_whole() -> None:
    dice = random.Random(1)
    lengths = [min(512, int(dice.lognormvariate(4, 0.7)) + 5) for _ in range(3000)]
    assert sum(lengths) / (512 * len(plan_blocks(lengths, 512))) > 0.99


@pytest.mark.parametrize("lengths", [[5, 11], [0, 5]])
def test_a_conversation_that_fits_no_block_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit blocks of 10"):
        plan_blocks(lengths, 10)


def documents(*rows: tuple[list[int], list[int]]) -> Documents:
    ids, labels = ([token for row in rows for token in row[i]] for i in range(2))
    return Documents(*(np.array(each, np.int32) for each in (ids, labels, [len(row[0]) for row in rows])))


def test_positions_restart_and_no_conversation_is_predicted_from_the_one_before() -> None:
    some = documents(([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5]), ([6], [-100]))
    (batch,) = pack_blocks(some, [[0, 1], [2]])
    assert batch.to_pydict() == {
        "input_ids": [[1, 2, 3, 4, 5], [6]],
        "labels": [[-100, 2, 3, -100, 5], [-100]],
        "position_ids": [[0, 1, 2, 0, 1], [0]],
    }


def test_more_blocks_than_fit_a_batch_keep_their_order() -> None:
    some = documents(*(([i, i], [-100, i]) for i in range(600)))
    batches = list(pack_blocks(some, [[i] for i in reversed(range(600))]))
    assert [ids[0] for batch in batches for ids in batch.column("input_ids").to_pylist()] == list(reversed(range(600)))
