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
                for row in _rows(batch.slice(start, _ROWS)):
                    yield {str(name): _plain(value) for name, value in row.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: the name of a column
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
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return []


def as_bytes(record: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode(errors="replace")


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Return rows as Python has them; where one holds what Python has not, what it holds is text.

    Such are days after the year 9999, zones that nobody knows and strings that are not UTF-8.
    """
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError, TypeError):
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return found


def _value(scalar: Any) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError, LookupError, TypeError):
        if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
            return scalar.as_buffer().to_pybytes()
        if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
            return [_value(each) for each in scalar.values or ()]
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(scalar[name]) for name in scalar.type.names}
        number = getattr(scalar, "value", None)
        return f"{scalar.type}" if number is None else f"{number} ({scalar.type})"


def _checked(batch: Any) -> Any:
    """Return a batch once its offsets are known to lie within it: those of a damaged file could end the process.

    Strings that are not UTF-8 are let through, to be found in their rows: the rest is judged with bytes in their place.
    """
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            column.validate()
            column.view(_of_bytes(column.type)).validate(full=True)
    return batch


def _of_bytes(kind: Any) -> Any:
    """Return an Arrow type with bytes where it has strings."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_of_bytes(each.type)) for each in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        made = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return made(kind.value_field.with_type(_of_bytes(kind.value_type)))
    return kind


def _batches(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            yield from map(_checked, file.iter_batches(_ROWS, use_threads=False))
        return
    with pa.OSFile(str(path), "rb") as source:
        reader = _reader(source)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for i in range(reader.num_record_batches):
                yield _checked(reader.get_batch(i))
        else:
            yield from map(_checked, reader)


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
