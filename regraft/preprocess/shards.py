"""Cutting the accepted rows into shards by their content, and keeping what was made of each.

A shard ends where a source ends, or at a row whose own id says so; so rows that are added, taken out or changed touch the
shards that they are in and no others (content-defined chunking, as in Muthitacharoen et al., "A Low-bandwidth Network
File System", SOSP 2001). What a shard became is kept in a folder named by the digest of everything that went into it,
outside the stage's outputs: a run with the cache and one without give the same bytes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, digest_file, read_json, verify_dir
from regraft.errors import DamagedArtifact, DataError, MissingInput

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("regraft.preprocess")
LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow")
"""What decides a prepared shard's bytes besides our code."""

_LEAST, _MOST = 8_192, 16_384  # rows of a shard that its content ends
_LEAST_OF_SOURCE = 1_024  # rows from which the end of a source ends a shard
_DIGITS = 3  # zeros that the id of a last row starts with: one in 4,096
_LONG = 1_024  # bytes of a row; where rows are twice as long on average, shards have half the rows, and so on
_FEWER = 1_024  # how many times fewer at most
_NOTE = "last.json"  # in a cache
_TEXTS, _NO_TEXTS = 1_024, 16_384  # rows read at once, with their messages and without


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `end` of `rows.parquet`, and the digest of their ids, times, sources and lines."""

    number: int
    first: int
    end: int
    digest: str

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.end - self.first


def cut(path: Path) -> Iterator[Shard]:
    """Yield the shards of `rows.parquet`, reading only the columns that do not hold texts.

    Where rows are long on average, shards have fewer, so that one fits into the memory of a process and every core gets
    some: a power of two times fewer, so that new rows hardly ever change it; then all are made anew.
    """
    import pyarrow as pa

    fewer = _fewer(path)
    least, most, of_source = _LEAST // fewer, _MOST // fewer, _LEAST_OF_SOURCE // fewer
    waiting: list[pa.Table] = []
    count = first = number = 0

    def made(end_of: int) -> Shard:
        nonlocal waiting, count, first, number
        whole = pa.concat_tables(waiting)
        shard = Shard(number, first, first + end_of, _digest(whole.slice(0, end_of)))
        waiting, count = ([whole.slice(end_of)] if end_of < count else []), count - end_of
        first, number = first + end_of, number + 1
        return shard

    previous: str | None = None
    for batch in read_batches(path, ("row_id", "source", "line", "at"), size=_NO_TEXTS):
        table = pa.Table.from_batches([batch])
        offset = 0
        for place, changed in _candidates(batch, previous, fewer):
            end_of = place if changed else place + 1
            waiting.append(table.slice(offset, end_of - offset))
            count, offset = count + end_of - offset, end_of
            while count > most:
                yield made(most)
            if count >= (of_source if changed else least):
                yield made(count)
        waiting.append(table.slice(offset))
        count += batch.num_rows - offset
        while count > most:
            yield made(most)
        previous = batch["source"][-1].as_py() if batch.num_rows else previous
    if count:
        yield made(count)


def _fewer(path: Path) -> int:
    """Return how many times fewer rows a shard has than of short rows, by the mean size of a row: a power of two."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    size = sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
    times = size // (_LONG * max(found.num_rows, 1))
    return min(1 << max(times.bit_length() - 1, 0), _FEWER)


def _starts(fewer: int) -> list[str]:
    """Return what ids of last rows start with: one of 4,096, and so many times more, starts with one of these."""
    digits, bits = divmod(fewer.bit_length() - 1, 4)
    return [f"{'0' * (_DIGITS - digits - 1)}{last:x}" for last in range(1 << bits)]


def _candidates(batch: "pa.RecordBatch", previous: str | None, fewer: int) -> list[tuple[int, bool]]:
    """Return (place, True) where another source begins and (place, False) of rows that may be a shard's last."""
    import pyarrow.compute as pc

    starts = [pc.starts_with(batch["row_id"], start) for start in _starts(fewer)]
    ends: list[Any] = pc.indices_nonzero(reduce(pc.or_, starts)).to_pylist()
    found = [(place, False) for place in ends]
    sources = batch["source"]
    if batch.num_rows > 1:
        changes: list[Any] = pc.indices_nonzero(
            pc.not_equal(sources.slice(1), sources.slice(0, len(sources) - 1))
        ).to_pylist()
        found += [(place + 1, True) for place in changes]
    if previous is not None and batch.num_rows and sources[0].as_py() != previous:
        found.append((0, True))
    return sorted(found, key=lambda each: (each[0], not each[1]))


def _digest(rows: "pa.Table") -> str:
    """Return the sha256 of the columns as they lie in memory (lengths, then contents): no value becomes an object."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    for name in ("row_id", "source", "at"):
        values: Any = pa.concat_arrays(rows[name].chunks)
        offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset :][: len(values) + 1]
        digest.update(np.diff(offsets).data)
        digest.update(memoryview(values.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        if values.null_count:  # a missing text is another than an empty one
            digest.update(memoryview(pc.cast(pc.is_null(values), pa.int8()).buffers()[1])[: len(values)])
        digest.update(b"%d" % values.null_count)
    lines: Any = pa.concat_arrays(rows["line"].chunks)
    digest.update(memoryview(lines.buffers()[1])[8 * lines.offset :][: 8 * len(lines)])
    return digest.hexdigest()


def read_batches(
    path: Path, columns: Iterable[str], first: int = 0, end: int | None = None, size: int = _TEXTS
) -> Iterator[Any]:
    """Yield record batches of rows `first` to `end`, of at most `size` rows or one row group each.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            at = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if (end is None or at < end) and at + rows > first:
                    for batch in file.iter_batches(size, [group], list(columns), use_threads=False):
                        low = max(first - at, 0)
                        high = batch.num_rows if end is None else min(end - at, batch.num_rows)
                        if low < high:
                            yield batch.slice(low, high - low)
                        at += batch.num_rows
                else:
                    at += rows
    except (pa.ArrowException, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {error}", fix="dvc repro validate")


class Cache:
    """Folders by digest, each whole and with a manifest; a damaged one counts as absent and is made again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, digest: str) -> Path:
        """Where the entry of a digest is, or will be."""
        return self.root / digest

    def find(self, digest: str) -> Path | None:
        """Return the entry if it is there and every byte of it is as it was written."""
        folder = self.folder(digest)
        if not folder.is_dir():
            return None
        try:
            verify_dir(folder)
        except (DamagedArtifact, MissingInput) as error:
            log.warning("%s; it is made again", error.message)
            return None
        os.utime(folder)
        return folder

    def make(self, digest: str) -> Any:
        """Return a context in which an entry is written; see `commit_dir`. `find` verifies it, so nobody waits for the disk."""
        return commit_dir(self.folder(digest), durable=False)

    def keep(self, used: Sequence[str], spare: int, purpose: str) -> None:
        """Remove entries that were not used now, but for the `spare` ones that were used last.

        Those that were used are noted, in their order, as what a later run for the same purpose is likely to use.
        """
        new = self.root / f".{_NOTE}"
        new.write_text(json.dumps({"purpose": purpose, "used": list(used)}), encoding="utf-8")
        new.replace(self.root / _NOTE)
        ours = {*used, _NOTE}
        others = [each for each in self.root.iterdir() if each.name not in ours and not each.name.startswith(".")]
        others.sort(key=lambda each: (-each.stat().st_mtime, each.name))
        for folder in others[spare:]:
            shutil.rmtree(folder, ignore_errors=True)

    def noted(self, purpose: str) -> list[str]:
        """Return what `keep` noted last, if that was for the same purpose and can be read."""
        try:
            note = read_json(self.root / _NOTE)
        except (DamagedArtifact, MissingInput):
            return []
        if not isinstance(note, dict) or note.get("purpose") != purpose or not isinstance(note.get("used"), list):
            return []
        return [each for each in note["used"] if isinstance(each, str)]


def put(source: Path, destination: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def versions() -> dict[str, str]:
    """Return the versions of `LIBRARIES`."""
    from importlib.metadata import version

    return {name: version(name) for name in LIBRARIES}


def code_digest() -> str:
    """Return the digest of the code that decides what becomes of a row: other code makes other entries."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / name for name in ("chat.py", "messages.py", "sealed.py"))])
    return hashlib.sha256("".join(digest_file(file) for file in files).encode()).hexdigest()
