"""Rows of Parquet and Arrow files, batch by batch, as plain values; and compressed files, as the bytes in them."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Literal

Compression = Literal["gz", "zst"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_ROWS = 512  # read at once


class Decompressed(io.RawIOBase):
    """The bytes in a compressed file; where it is damaged or cut off it ends, and `problem` says so."""

    def __init__(self, source: Any, compression: Compression) -> None:
        self.problem: str | None = None
        self._compression = compression
        if compression == "gz":
            self._inner: Any = gzip.GzipFile(fileobj=source)
        else:
            import pyarrow as pa

            self._inner = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")

    def readable(self) -> bool:
        """Say that it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end, and where the compression is damaged."""
        if self.problem is not None:
            return 0
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, OSError, zlib.error, ValueError) as error:
            self.problem = f"its {self._compression} compression is damaged or cut off ({type(error).__name__})"
            return 0
        memoryview(buffer)[: len(data)] = data
        return len(data)


def read_table(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as JSON could hold them: times as ISO 8601, bytes and decimals as text.

    Raises:
        ValueError: the file is damaged, cut off, or of another format; rows before that were yielded.
    """
    import pyarrow as pa

    try:
        for batch in _batches(path, kind):
            for start in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(start, _ROWS).to_pylist():
                    yield {str(name): _plain(value) for name, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it is not {kind}, damaged or cut off ({type(error).__name__})") from error


def columns_of_table(path: Path, kind: Literal["parquet", "arrow"]) -> list[str]:
    """Return the columns of a file, empty where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            return list(pq.read_schema(path).names)
        with pa.OSFile(str(path), "rb") as file:
            return list(_reader(file).schema.names)
    except (pa.ArrowException, OSError):
        return []


def as_bytes(record: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode(errors="replace")


def _batches(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_ROWS, use_threads=False)
        return
    with pa.OSFile(str(path), "rb") as source:
        reader = _reader(source)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
        else:
            yield from reader


def _reader(source: Any) -> Any:
    """Open an Arrow file in either of its two formats."""
    import pyarrow as pa

    start = source.read(6)
    source.seek(0)
    return pa.ipc.open_file(source) if bytes(start) == b"ARROW1" else pa.ipc.open_stream(source)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # what is no UTF-8 is found as such
    if isinstance(value, str | int | float | bool | None):
        return value
    return str(value)
