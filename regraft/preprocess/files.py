"""The stage's files: Arrow streams and a Parquet table, the same bytes for the same content."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ROWS_IN_BATCH = 1024


def numbers(values: "np.ndarray") -> Any:
    """Return numbers as an Arrow array over the same memory.

    `pyarrow.array` would ask whether they are a pandas object, and import pandas for that: a fifth of a second for every
    process, the time in which a thousand rows are prepared.
    """
    import numpy as np
    import pyarrow as pa

    whole = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(whole.dtype), len(whole), [None, pa.py_buffer(whole.data)])


def texts(values: Sequence[str | bytes], kind: "pa.DataType | None" = None) -> Any:
    """Return texts, or (`kind` pa.binary()) bytes, as an Arrow array; see `numbers`."""
    import numpy as np
    import pyarrow as pa

    content = [value.encode() if isinstance(value, str) else value for value in values]
    ends = np.fromiter(accumulate(map(len, content), initial=0), np.int64, len(content) + 1)
    if ends[-1] > np.iinfo(np.int32).max:  # an Arrow array of this kind holds 2 GiB
        return pa.array(values, kind or pa.string())
    buffers = [None, pa.py_buffer(ends.astype(np.int32).data), pa.py_buffer(b"".join(content))]
    return pa.Array.from_buffers(kind or pa.string(), len(content), buffers)


def lists(flat: "np.ndarray", sizes: "np.ndarray") -> Any:
    """Return lists of numbers that lie end to end in `flat`, as an Arrow array."""
    import numpy as np
    import pyarrow as pa

    return pa.ListArray.from_arrays(numbers(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)), numbers(flat))


def block_schema() -> "pa.Schema":
    """Schema of `train-*.arrow`: a row for each block."""
    import pyarrow as pa

    return pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "position_ids")])


def holdout_schema() -> "pa.Schema":
    """Schema of `holdout-*.arrow`: `prompt` is the JSON of the messages before the last answer."""
    import pyarrow as pa

    text, tokens = pa.string(), pa.list_(pa.int32())
    return pa.schema(
        [
            ("row_id", text),
            ("slices", pa.map_(text, text)),
            ("prompt", text),
            ("answer", text),
            *((name, tokens) for name in ("prompt_ids", "input_ids", "labels")),
        ]
    )


def pair_schema(*, held: bool) -> "pa.Schema":
    """Schema of `pairs-*.arrow`, and (`held`) of `holdout_pairs-*.arrow`: one of the answers may be empty."""
    import pyarrow as pa

    text, tokens = pa.string(), pa.list_(pa.int32())
    fields = [("row_id", text), *([("slices", pa.map_(text, text))] if held else [])]
    return pa.schema([*fields, *((name, tokens) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))])


def write_stream(path: Path, schema: "pa.Schema", batches: Iterable["pa.RecordBatch"]) -> None:
    """Write an Arrow IPC stream, as `datasets.Dataset.from_file` reads it."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_holdout(path: Path, batches: list["pa.RecordBatch"]) -> None:
    """Write the holdout in the order of `row_id`."""
    import pyarrow as pa

    table = pa.Table.from_batches(batches, holdout_schema()).sort_by("row_id").combine_chunks()
    write_stream(path, table.schema, table.to_batches(max_chunksize=ROWS_IN_BATCH))
