"""What differs between two versions of the accepted rows: what a retraining would learn that the last one could not.

In memory: 16 bytes for each row, 8 for each different run of words of the older version; texts are read in batches.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import MissingInput
from regraft.messages import called, words
from regraft.preprocess.holdout import plain
from regraft.preprocess.near import distinct, grams
from regraft.preprocess.shards import read_batches

RUN = 5  # words: shorter runs are idioms, longer ones are new in any new text
_SHOWN = 10


class Difference(BaseModel):
    """From an older version of `rows.parquet` to a newer one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows_before: int
    rows_after: int
    same: int
    """Rows of the newer version that the older one has, too, with equal messages and slices."""
    new: int
    """Rows that are only in the newer version, without `changed`."""
    removed: int
    """Rows that are only in the older version, without `changed`."""
    changed: int
    """Rows of one `id` whose messages or slices differ."""
    repeated: int
    """New or changed rows whose messages, but for letter case and spacing, the older version has in some row."""
    new_words: int
    """Different words in new or changed rows that no older row has."""
    most_frequent_new_words: dict[str, int]
    """At most ten, each with the rows that hold it; words of fewer than 30 letters, in at least two rows."""
    novel_runs: float
    """Share of the runs of five words in new or changed rows that no older row has; 0 without any."""
    slices: dict[str, dict[str, int]]
    """By slice and value, rows after less rows before, where not 0; sources are the slice `source`."""
    calls: dict[str, int] = Field(default_factory=dict)
    """By the name of a tool, messages that call it after less those before, where not 0."""


@dataclass(frozen=True)
class Moved:
    """Which rows came, went and changed, by their ids alone: a few seconds for a million rows."""

    before: int
    after: int
    same: int
    new: int
    changed: int
    removed: int
    slices: dict[str, dict[str, int]]
    """As in `Difference`."""
    fresh: frozenset[bytes]
    """The row_ids that only the newer version has."""

    @property
    def touched(self) -> int:
        """Rows that are new, changed or removed."""
        return self.new + self.changed + self.removed

    @property
    def told(self) -> str:
        """The counts in words."""
        return (
            f"{self.before:,} rows before, {self.after:,} after: {self.same:,} the same, {self.new:,} new, "
            f"{self.changed:,} changed, {self.removed:,} removed"
        )


def moved(before: Path, after: Path) -> Moved:
    """Compare two `rows.parquet` by the ids of their rows; no text is read.

    Raises:
        MissingInput: a file is not there.
        DataError: one cannot be read.
    """
    for path in (before, after):
        if not path.is_file():
            raise MissingInput(f"{path} is missing", fix="name the rows.parquet of an output of `validate`")
    old_ids, old_names = _ids(before)
    new_ids, new_names = _ids(after)
    fresh, gone = frozenset(new_ids) - set(old_ids), frozenset(old_ids) - set(new_ids)
    changed = sum(row in fresh and old_names.get(name) in gone for name, row in new_names.items())
    counted = _slices(after)
    counted.subtract(_slices(before))
    slices: dict[str, dict[str, int]] = {}
    for (name, value), count in sorted(counted.items()):
        if count:
            slices.setdefault(name, {})[value] = count
    new = sum(row in fresh for row in new_ids)
    return Moved(
        before=len(old_ids),
        after=len(new_ids),
        same=len(new_ids) - new,
        new=new - changed,
        changed=changed,
        removed=sum(row in gone for row in old_ids) - changed,
        slices=slices,
        fresh=fresh,
    )


def diff_rows(before: Path, after: Path) -> Difference:
    """Compare two `rows.parquet`.

    Raises:
        MissingInput: a file is not there.
        DataError: one cannot be read.
    """
    import numpy as np

    rows = moved(before, after)
    runs = [np.empty(0, np.uint64)]
    texts: set[int] = set()
    words: set[str] = set()
    for batch in read_batches(before, ("messages",)):
        some = [_text(messages) for messages in batch["messages"].to_pylist()]
        runs.append(distinct(grams(some, RUN)[0]))
        texts.update(hash(text) for text in some)
        words.update(*(text.split() for text in some))
    known = distinct(np.concatenate(runs))
    found: Counter[str] = Counter()
    repeated = all_runs = novel = 0
    for batch in read_batches(after, ("row_id", "messages")):
        some = [
            _text(messages)
            for row, messages in zip(batch["row_id"].to_pylist(), batch["messages"].to_pylist(), strict=True)
            if bytes.fromhex(row) in rows.fresh
        ]
        own = grams(some, RUN)[0]
        all_runs, novel = all_runs + len(own), novel + int((~np.isin(own, known)).sum())
        repeated += sum(hash(text) in texts for text in some)
        for text in some:
            found.update(set(text.split()) - words)
    shown = [(word, count) for word, count in found.items() if count > 1 and len(word) < 30 and word.isalpha()]
    return Difference(
        rows_before=rows.before,
        rows_after=rows.after,
        same=rows.same,
        new=rows.new,
        removed=rows.removed,
        changed=rows.changed,
        repeated=repeated,
        new_words=len(found),
        most_frequent_new_words=dict(sorted(shown, key=lambda each: (-each[1], each[0]))[:_SHOWN]),
        novel_runs=round(novel / all_runs, 4) if all_runs else 0.0,
        slices=rows.slices,
        calls={name: count for name, count in sorted(_calls(before, after).items()) if count},
    )


def lines(found: Difference) -> list[str]:
    """Return the difference for a person."""
    said = [
        f"{found.rows_before:,} rows before, {found.rows_after:,} after: {found.same:,} the same, {found.new:,} new, "
        f"{found.changed:,} changed, {found.removed:,} removed",
        f"of the new and changed ones {found.repeated:,} repeat an older text; {found.novel_runs:.1%} of their runs of "
        f"{RUN} words are new, and {found.new_words:,} words"
        + (f": {', '.join(found.most_frequent_new_words)}" if found.most_frequent_new_words else ""),
    ]
    for name, values in found.slices.items():
        said.append(f"{name}: " + ", ".join(f"{value} {count:+,}" for value, count in values.items()))
    if found.calls:
        said.append("calls of tools: " + ", ".join(f"{name} {count:+,}" for name, count in found.calls.items()))
    return said


def _ids(path: Path) -> tuple[list[bytes], dict[str, bytes]]:
    """Return the row_ids as bytes, and the row_id of each `id`."""
    rows: list[bytes] = []
    names: dict[str, bytes] = {}
    for batch in read_batches(path, ("row_id", "id")):
        own = [bytes.fromhex(each) for each in batch["row_id"].to_pylist()]
        rows += own
        names |= {name: row for name, row in zip(batch["id"].to_pylist(), own, strict=True) if name is not None}
    return rows, names


def _text(messages: list[dict[str, Any]]) -> str:
    return plain("\n".join(words(each) for each in messages))


def _calls(before: Path, after: Path) -> Counter[str]:
    counted: Counter[str] = Counter()
    for path, sign in ((before, -1), (after, 1)):
        for batch in read_batches(path, ("messages",)):
            for messages in batch["messages"].to_pylist():
                for name in (name for each in messages for name in called(each)):
                    counted[name] += sign
    return counted


def _slices(path: Path) -> Counter[tuple[str, str]]:
    counted: Counter[tuple[str, str]] = Counter()
    for batch in read_batches(path, ("slices",)):
        for slices in batch["slices"].to_pylist():
            counted.update(slices or ())
    return counted
