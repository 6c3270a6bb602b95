from pathlib import Path

import datasets
import pytest

from regraft.artifacts import commit_dir
from regraft.errors import DamagedArtifact, MissingInput
from regraft.train.data import as_arrays, collate, open_blocks

LONG = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "position_ids": [0, 1, 2, 0, 1]}
SHORT = {"input_ids": [4, 3], "labels": [-100, 3], "position_ids": [0, 1]}


def test_padding_is_a_document_of_its_own_that_trains_nothing() -> None:
    batch = collate([LONG, SHORT], pad_id=0)

    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["tokens"] == 7


def test_a_batch_says_what_a_step_would_have_to_ask_a_gpu_for() -> None:
    batch = collate([LONG, SHORT], pad_id=0)

    assert batch["trained"].tolist() == [[0, 0, 0, 1], [0, 1, 3, 0]]  # states before the trained tokens
    assert (batch["ends"].tolist(), batch["longest"]) == ([0, 3, 5, 7, 10], 3)
    assert isinstance(batch["longest"], int)
    assert as_arrays(datasets.Dataset.from_list([LONG]))[0]["labels"].tolist() == LONG["labels"]


def test_a_documents_first_token_is_never_a_target() -> None:
    mislabelled = {**LONG, "labels": [5, 6, 7, 8, 9]}

    assert collate([mislabelled], pad_id=0)["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def test_blocks_come_back_in_order_from_the_arrow_stream(dataset: Path) -> None:
    blocks = open_blocks(dataset)

    assert blocks.rows.column_names == ["input_ids", "labels", "position_ids"]
    assert len(blocks.rows) == 10
    assert blocks.rows[0]["position_ids"][:3] == [0, 1, 2]


def test_an_altered_byte_of_the_training_set_is_found_before_use(make_dataset, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "preprocess")
    file = folder / "train-00000.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    with pytest.raises(DamagedArtifact, match=r"train-00000\.arrow: its sha256 differs"):
        open_blocks(folder)


def test_a_missing_training_set_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with commit_dir(tmp_path / "empty"):
        pass

    with pytest.raises(MissingInput, match="dvc repro preprocess"):
        open_blocks(tmp_path / "empty")
