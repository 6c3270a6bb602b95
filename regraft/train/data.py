"""Packed blocks: reading them without loading them, and batching them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import read_json, verify_dir
from regraft.errors import DataError, MissingInput

if TYPE_CHECKING:
    import datasets
    import torch

IGNORE = -100
"""Label of a token that is not trained."""
_COLUMNS = {"input_ids", "labels", "position_ids"}


@dataclass(frozen=True)
class Blocks:
    """The training set: memory-mapped rows of `input_ids`, `labels` and `position_ids`, and their digest."""

    rows: "datasets.Dataset"
    digest: str
    """`train_digest` of the preprocess report."""


def open_blocks(dataset: Path) -> Blocks:
    """Open the training side of the stage `preprocess`, after checking every byte of its folder.

    Raises:
        MissingInput: the stage has not run.
        DamagedArtifact: a byte differs from the manifest.
        DataError: there is no block, or a column is missing.
    """
    files = sorted(dataset.glob("train-*.arrow"))
    if not files:
        raise MissingInput(f"{dataset} holds no train-*.arrow", fix="dvc repro preprocess")
    verify_dir(dataset)
    import datasets

    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    if not set(rows.column_names) >= _COLUMNS:
        raise DataError(f"{files[0]} has the columns {rows.column_names}, expected {sorted(_COLUMNS)}")
    if len(rows) == 0:
        raise DataError(
            f"{dataset} holds no block to train on", fix="add rows, or lower preprocess.holdout.share, then repeat"
        )
    return Blocks(rows=rows, digest=read_json(dataset / "report.json")["train_digest"])


def split(rows: "datasets.Dataset", share: float) -> tuple["datasets.Dataset", "datasets.Dataset | None"]:
    """Return the blocks that are trained on, and those that measure a held-out loss: every so many-th one.

    Raises:
        DataError: too few blocks for both.
    """
    if share == 0:
        return rows, None
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{len(rows)} blocks are too few for a validation_share of {share}", fix="lower it, or add rows"
        )
    held_out = [(2 * index + 1) * len(rows) // (2 * count) for index in range(count)]
    kept = sorted({*range(len(rows))} - {*held_out})
    return rows.select(kept), rows.select(held_out)


def as_arrays(rows: "datasets.Dataset") -> "datasets.Dataset":
    """Return rows whose columns are read as arrays: lists of thousands of tokens take ten times as long to batch."""
    return rows.with_format("numpy")


def batches(rows: "datasets.Dataset", batch_size: int, pad_id: int) -> Iterator[dict[str, Any]]:
    """Yield all blocks once, in their order, as `collate` makes them."""
    for first in range(0, len(rows), batch_size):
        yield collate([rows[index] for index in range(first, min(first + batch_size, len(rows)))], pad_id)


def moved(batch: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Put a batch's tensors on a device."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Any]:
    """Batch packed blocks of any lengths.

    The model gets no attention mask: transformers builds a block-diagonal one from positions that restart. So padding
    is a document of its own (its positions start at 0 again), which real tokens never see. A document's first token
    is never a target: it would be predicted from another document.

    Returns:
        `input_ids`, `labels`, `position_ids`, int64 of (blocks, longest block); `tokens`, how many are not padding. And
        what the step would have to ask a GPU for, waiting for all that it has still to do: `trained`, int64 of (2,
        trained tokens), block and place of the states that predict a trained token; `ends`, int32, where documents begin
        in the flattened batch, and its end; `longest`, the longest of them.
    """
    import torch

    from regraft.model.attention import boundaries

    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    position_ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
        position_ids[index, :length] = torch.as_tensor(row["position_ids"])
        position_ids[index, length:] = torch.arange(longest - length)
    labels[position_ids == 0] = IGNORE
    documents = boundaries(position_ids)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "trained": (labels[:, 1:] != IGNORE).nonzero().T.contiguous(),
        "ends": documents["cu_seq_lens_q"],
        "longest": documents["max_length_q"],
    }
