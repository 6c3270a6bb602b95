"""The stage's files: Arrow streams and a Parquet table, the same bytes for the same content."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_IN_BATCH = 1024


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
