"""Packing conversations into blocks: best fit, longest first (Ding et al., "Fewer Truncations", arXiv:2404.10830)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from regraft.chat import IGNORED
from regraft.preprocess.files import block_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def plan_blocks(lengths: Sequence[int], block_length: int) -> list[list[int]]:
    """Return blocks of indices into `lengths`, none cut, none with more than `block_length` tokens.

    Takes conversations by falling length and puts each where the least room is left over. Blocks are in the order of
    their first member, members in theirs, so equal lengths in equal order give equal blocks. About a microsecond for
    each conversation and thousand tokens of block length.

    Raises:
        ValueError: a length is not positive or exceeds `block_length`.
    """
    if lengths and not 0 < min(lengths) <= max(lengths) <= block_length:
        raise ValueError(f"lengths of {min(lengths)} to {max(lengths)} tokens do not fit blocks of {block_length}")
    blocks: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(block_length + 1)]  # room left to blocks
    rooms = 0  # bit r is set where with_room[r] is not empty: the best fit is the lowest one set from `length` on
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            block = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, block = block_length, len(blocks)
            blocks.append([])
        blocks[block].append(index)
        left = room - length
        if left:
            with_room[left].append(block)
            rooms |= 1 << left
    for members in blocks:
        members.sort()
    return sorted(blocks)


class Spool:
    """Tokens and labels of many conversations on disk, so that none of them stays in memory."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / "tokens.i32", folder / "labels.i32")
        self._files = [path.open("wb") for path in self._paths]
        self.lengths: list[int] = []
        self._views: list[np.ndarray] = []
        self._ends: np.ndarray | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._views = []
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)

    def append(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add one conversation."""
        import numpy as np

        for file, values in zip(self._files, (input_ids, labels), strict=True):
            file.write(np.asarray(values, dtype="<i4").tobytes())
        self.lengths.append(len(input_ids))

    def seal(self) -> None:
        """End writing; from now on conversations can be read."""
        import numpy as np

        for file in self._files:
            file.flush()
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._views = [np.memmap(path, dtype="<i4", mode="r") for path in self._paths] if self.lengths else []

    def read(self, index: int) -> tuple["np.ndarray", "np.ndarray"]:
        """Return (input_ids, labels) of a conversation as int32 views."""
        assert self._ends is not None, "seal() the spool before reading"
        end = int(self._ends[index])
        tokens, labels = (view[end - self.lengths[index] : end] for view in self._views)
        return tokens, labels


def pack_blocks(spool: Spool, blocks: Iterable[Sequence[int]]) -> Iterator["pa.RecordBatch"]:
    """Yield batches with columns `input_ids`, `labels` and `position_ids`, a row for each block.

    Positions restart at each conversation, and its first label is never learned: it would be predicted from the
    conversation before.
    """
    import numpy as np

    schema = block_schema()
    batch: list[list[np.ndarray]] = []
    for members in blocks:
        tokens, labels, positions = [], [], []
        for index in members:
            ids, learned = spool.read(index)
            learned = learned.copy()
            learned[0] = IGNORED
            tokens.append(ids)
            labels.append(learned)
            positions.append(np.arange(len(ids), dtype=np.int32))
        batch.append([np.concatenate(part) for part in (tokens, labels, positions)])
        if len(batch) == 256:
            yield _batch(batch, schema)
            batch = []
    if batch:
        yield _batch(batch, schema)


def _batch(rows: list[list["np.ndarray"]], schema: "pa.Schema") -> "pa.RecordBatch":
    import numpy as np
    import pyarrow as pa

    offsets = pa.array(np.cumsum([0, *(len(row[0]) for row in rows)]), pa.int32())
    columns = [
        pa.ListArray.from_arrays(
            offsets, pa.array(np.concatenate([row[i] for row in rows]).astype(np.int32, copy=False))
        )
        for i in range(3)
    ]
    return pa.record_batch(columns, schema=schema)
