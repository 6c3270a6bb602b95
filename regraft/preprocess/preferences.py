"""Preferences as tokens: each row's prompt with the answer that is wanted, the one that is not, or both.

Both answers go through the same template, mask and audit as any other; an answer is the tokens that are learned after the
prompt, its end of turn included and nothing behind it. A row stays only with all of its answers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.chat import IGNORED
from regraft.errors import DataError
from regraft.preprocess.columns import Talks, Tokens
from regraft.preprocess.files import ROWS_IN_BATCH, pair_schema, write_stream

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("rejected", "wanted")
"""Columns that `rows.parquet` has where it holds preferences."""
PAIRS, HOLDOUT_PAIRS = "pairs.arrow", "holdout_pairs.arrow"


def holds_preferences(rows: Path) -> bool:
    """Say whether a `rows.parquet` holds preferences."""
    import pyarrow.parquet as pq

    return set(COLUMNS) <= set(pq.read_schema(rows).names)


def other_answers(columns: Mapping[str, list[Any]], inside: Iterable[int], first: int) -> Talks:
    """Return the conversations of some rows of a batch that end in answers that are not wanted.

    Args:
        columns: the batch.
        inside: which of its rows.
        first: where it begins in its shard.
    """
    talks = Talks([], [], [])
    for i in inside:
        messages, rejected = columns["messages"][i], columns["rejected"][i]
        if rejected is not None:
            messages = [*messages[:-1], {"role": "assistant", "content": rejected}]
        elif columns["wanted"][i]:
            continue
        talks.places.append(first + i)
        talks.messages.append(messages)
        talks.names.append(f"{columns['source'][i]} line {columns['line'][i]}, its other answer")
    return talks


@dataclass
class _Row:
    place: int
    row_id: str
    slices: Any
    prompt: "np.ndarray"
    chosen: "np.ndarray | None" = None
    rejected: "np.ndarray | None" = None
    tokens: int = 0
    trained: int = 0


@dataclass
class Preferences:
    """The rows of one side of a shard."""

    rows: list[_Row] = field(default_factory=list)

    def add(
        self, columns: Mapping[str, list[Any]], first: int, wanted: Tokens, since: int, others: Tokens
    ) -> list[int]:
        """Join the answers of a batch's rows, and return the places of those that have an unwanted answer only.

        Args:
            columns: the batch.
            first: where it begins in its shard.
            wanted: conversations with the answers that are wanted.
            since: how many arrays `wanted` had before this batch.
            others: those with the answers that are not.

        Raises:
            DataError: the template renders the prompt of a pair in two ways.
        """
        chosen, rejected = _split(wanted, since), _split(others, 0)
        alone = []
        for place in sorted({*chosen, *rejected}):
            i = place - first
            whole, other = chosen.get(place), rejected.get(place)
            prompt = (whole or other or (None,))[0]
            assert prompt is not None
            row = _Row(place, columns["row_id"][i], sorted(columns["slices"][i] or ()), prompt)
            if columns["rejected"][i] is None:
                if whole is not None:
                    row.chosen = whole[1]
                elif other is not None:
                    row.rejected, row.tokens, row.trained = other[1], other[2], len(other[1])
                    alone.append(place)
            elif whole is None or other is None:
                continue  # what has lost one answer is counted where it was lost
            elif whole[0].tolist() != other[0].tolist():
                raise DataError(
                    f"{columns['source'][i]} line {columns['line'][i]}: the chat template renders the prompt in two ways "
                    "before the two answers, so they cannot be compared",
                    fix="use a base model with another template",
                )
            else:
                row.chosen, row.rejected = whole[1], other[1]
            self.rows.append(row)
        return alone

    def write_train(self, path: Path, keys: "np.ndarray", copies: "np.ndarray | None") -> None:
        """Write the training side in the order of the keys, as its blocks are, each row as often as it is trained on."""
        self.rows.sort(key=lambda row: (keys[row.place].tobytes(), row.row_id))
        some = self.rows if copies is None else [row for row in self.rows for _ in range(int(copies[row.place]))]
        self._write(path, some, held=False)

    def write_holdout(self, path: Path) -> None:
        """Write the holdout in the order of `row_id`."""
        self.rows.sort(key=lambda row: row.row_id)
        self._write(path, self.rows, held=True)

    def _write(self, path: Path, rows: list[_Row], *, held: bool) -> None:
        import pyarrow as pa

        schema = pair_schema(held=held)
        values: dict[str, Any] = {
            "row_id": [row.row_id for row in rows],
            "slices": [row.slices for row in rows],
            "prompt_ids": [row.prompt for row in rows],
            "chosen_ids": [[] if row.chosen is None else row.chosen for row in rows],
            "rejected_ids": [[] if row.rejected is None else row.rejected for row in rows],
        }
        table = pa.table([pa.array(values[each.name], each.type) for each in schema], schema=schema)
        write_stream(path, schema, table.to_batches(max_chunksize=ROWS_IN_BATCH))


def _split(tokens: Tokens, since: int) -> dict[int, tuple["np.ndarray", "np.ndarray", int]]:
    """Return prompt, answer and length of each conversation by its place, from the arrays `since` on."""
    import numpy as np

    none = np.empty(0, np.int32)
    ids, labels, lengths, prompts = (
        np.concatenate([none, *arrays[since:]])
        for arrays in (tokens.ids, tokens.labels, tokens.lengths, tokens.prompts)
    )
    places = tokens.places[len(tokens.places) - len(lengths) :]
    ends = np.cumsum(lengths)
    found = {}
    for place, end, length, prompt in zip(places, ends.tolist(), lengths.tolist(), prompts.tolist(), strict=True):
        start, at = end - length, end - length + prompt
        answer = ids[at:end][labels[at:end] != IGNORED]
        found[place] = (ids[start:at], answer, length)
    return found
