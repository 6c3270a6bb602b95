"""What differs between two versions of the accepted rows: what a retraining would learn that the last one could not.

In memory: 16 bytes for each row, 8 for each different run of words of the older version; texts are read in batches.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import MissingInput
from regraft.messages import called, words
from regraft.preprocess.holdout import plain
from regraft.preprocess.near import grams
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

    @property
    def touched(self) -> int:
        """Rows that are new, changed or removed."""
        return self.new + self.changed + self.removed


def diff_rows(before: Path, after: Path) -> Difference:
    """Compare two `rows.parquet`.

    Raises:
        MissingInput: a file is not there.
        DataError: one cannot be read.
    """
    import numpy as np

    for path in (before, after):
        if not path.is_file():
            raise MissingInput(f"{path} is missing", fix="name the rows.parquet of an output of `validate`")
    old_ids, old_names = _ids(before)
    new_ids, new_names = _ids(after)
    fresh = set(new_ids) - set(old_ids)
    gone = set(old_ids) - set(new_ids)
    changed = {name for name, row in new_names.items() if row in fresh and old_names.get(name) in gone}

    runs = [np.empty(0, np.uint64)]
    texts: set[int] = set()
    words: set[str] = set()
    for batch in read_batches(before, ("messages",)):
        some = [_text(messages) for messages in batch["messages"].to_pylist()]
        runs.append(np.unique(grams(some, RUN)[0]))
        texts.update(hash(text) for text in some)
        words.update(*(text.split() for text in some))
    known = np.unique(np.concatenate(runs))
    found: Counter[str] = Counter()
    repeated = all_runs = novel = 0
    for batch in read_batches(after, ("row_id", "messages")):
        some = [
            _text(messages)
            for row, messages in zip(batch["row_id"].to_pylist(), batch["messages"].to_pylist(), strict=True)
            if bytes.fromhex(row) in fresh
        ]
        own = grams(some, RUN)[0]
        all_runs, novel = all_runs + len(own), novel + int((~np.isin(own, known)).sum())
        repeated += sum(hash(text) in texts for text in some)
        for text in some:
            found.update(set(text.split()) - words)
    shown = [(word, count) for word, count in found.items() if count > 1 and len(word) < 30 and word.isalpha()]
    slices = _slices(after)
    slices.subtract(_slices(before))
    grown: dict[str, dict[str, int]] = {}
    for (name, value), count in sorted(slices.items()):
        if count:
            grown.setdefault(name, {})[value] = count
    return Difference(
        rows_before=len(old_ids),
        rows_after=len(new_ids),
        same=sum(row not in fresh for row in new_ids),
        new=sum(row in fresh for row in new_ids) - len(changed),
        removed=sum(row in gone for row in old_ids) - len(changed),
        changed=len(changed),
        repeated=repeated,
        new_words=len(found),
        most_frequent_new_words=dict(sorted(shown, key=lambda each: (-each[1], each[0]))[:_SHOWN]),
        novel_runs=round(novel / all_runs, 4) if all_runs else 0.0,
        slices=grown,
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
