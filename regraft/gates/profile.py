"""What accepted rows are like, in counts: small enough to lie beside an adapter, so that later data can be compared with it.

Counts are over a sample that each row's own content decides, so that equal rows give equal profiles and most of the
sample stays when rows are added.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.report import Report

NAME = "profile.json"
SAMPLE = 20_000  # rows; more make small differences certain that do not matter
_BUCKETS = 256  # of hashed pairs of words
_COLUMNS = ["row_id", "source", "messages", "slices", "at"]
_IDS = 1 << 32


class Profile(Report):
    """Counts of a sample of rows; each row counts once in each part."""

    rows: int
    """Rows in all."""
    sampled: int
    """Rows counted."""
    newest: str | None
    """The latest time of any row, as the rows write it; null where they have none."""
    parts: dict[str, dict[str, int]]
    """For each part the counts by value: `prompt length` and `answer length` (characters, by half powers of two),
    `source` (the file's folder), `slice NAME`, `words` (one pair of neighbouring words of each row, hashed)."""


def profile(rows: Path, *, sample: int = SAMPLE) -> Profile:
    """Count accepted rows.

    Args:
        rows: `rows.parquet` of the stage `validate`.
        sample: rows that are counted, about.

    Raises:
        MissingInput: there is no such file.
        DamagedArtifact: the file is not one of accepted rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts: dict[str, Counter[str]] = {}
    newest, sampled = None, 0
    try:
        file = pq.ParquetFile(rows)
        total = file.metadata.num_rows
        limit = _IDS if total <= sample else int(_IDS * (sample / total))
        for batch in file.iter_batches(columns=_COLUMNS):
            times = [time for time in batch.column("at").to_pylist() if time is not None]
            newest = max([newest, *times] if newest is not None else times, default=None)
            taken = [int(str(row)[:8], 16) < limit for row in batch.column("row_id").to_pylist()]
            for row in batch.filter(pa.array(taken)).to_pylist():
                sampled += 1
                for part, value in _values(row):
                    parts.setdefault(part, Counter()).update([value])
    except FileNotFoundError as error:
        raise MissingInput(f"there are no accepted rows at {rows}", fix="regraft validate") from error
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DamagedArtifact(f"{rows} does not hold accepted rows: {error}", fix="regraft validate") from error
    counts = {part: dict(sorted(counted.items())) for part, counted in sorted(parts.items())}
    return Profile(rows=total, sampled=sampled, newest=None if newest is None else str(newest), parts=counts)


def read_profile(file: Path) -> Profile:
    """Read a profile that was registered with an adapter.

    Raises:
        DamagedArtifact: it is not a profile.
        OSError: it can't be read.
    """
    return Profile.model_validate(read_json(file))


def _values(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    prompt = " ".join(turn["content"] or "" for turn in row["messages"] if turn["role"] != "assistant")
    answer = " ".join(turn["content"] or "" for turn in row["messages"] if turn["role"] == "assistant")
    yield "prompt length", _half_power(len(prompt))
    yield "answer length", _half_power(len(answer))
    yield "source", str(row["source"]).rpartition("/")[0] or "."
    for name, value in row["slices"] or ():
        yield f"slice {name}", str(value)
    # Rows are independent of each other, pairs of one row are not: one pair of each row keeps the counts multinomial.
    words = prompt.casefold().split()
    if len(words) > 1:
        at = int(row["row_id"][8:16], 16) % (len(words) - 1)
        yield "words", f"{zlib.crc32(' '.join(words[at : at + 2]).encode()) % _BUCKETS:03d}"


def _half_power(length: int) -> str:
    """Name the half power of two that a length falls into: `16` holds 16 to 22 characters, `23` 23 to 31."""
    if length == 0:
        return "0"
    whole = length.bit_length() - 1
    start = 1 << whole
    middle = int(start * 2**0.5) + 1
    return str(middle if length >= middle > start else start)
