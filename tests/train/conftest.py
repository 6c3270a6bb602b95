"""A pinned tiny base and a small packed training set, as the stages before `train` leave them."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regraft.artifacts import commit_dir, digest_file, digest_json
from regraft.model.params import ModelParams
from regraft.train.params import TrainParams

PARAMS = TrainParams(
    max_steps=6,
    batch_size=2,
    accumulation=2,
    rank=4,
    alpha=8,
    dropout=0.1,
    learning_rate=5e-3,
    warmup=0.2,
    checkpoint_every=2,
    keep_checkpoints=2,
    logging_every=2,
    threads=1,
)


def documents(count: int, seed: int = 0, vocabulary: int = 380) -> Iterator[tuple[list[int], list[int]]]:
    """Documents of random tokens in which the second half repeats the first, and only the second half is trained."""
    chance = random.Random(seed)
    for _ in range(count):
        half = [chance.randrange(3, vocabulary) for _ in range(chance.randrange(3, 8))]
        yield half + half, [-100] * len(half) + half


def write_dataset(folder: Path, count: int = 40, seed: int = 0, block: int = 48) -> Path:
    """Pack documents into blocks and write them as the stage `preprocess` does."""
    import pyarrow as pa

    blocks: list[dict[str, list[int]]] = [{"input_ids": [], "labels": [], "position_ids": []}]
    for ids, labels in documents(count, seed):
        if len(blocks[-1]["input_ids"]) + len(ids) > block:
            blocks.append({"input_ids": [], "labels": [], "position_ids": []})
        blocks[-1]["input_ids"] += ids
        blocks[-1]["labels"] += labels
        blocks[-1]["position_ids"] += range(len(ids))
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in blocks[0]])
    with commit_dir(folder) as out:
        path = out / "train-00000.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(blocks, schema))
        (out / "report.json").write_text(json.dumps({"schema_version": 1, "train_digest": digest_file(path)}))
    return folder


@pytest.fixture(scope="session")
def params() -> TrainParams:
    """Six steps in a second, with everything on that draws random numbers or carries state."""
    return PARAMS


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    """The function that writes a training set: (folder, count, seed, block)."""
    return write_dataset


@pytest.fixture(scope="session")
def pinned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the stage `model` for the tiny base."""
    from regraft.model.pin import pin

    folder = tmp_path_factory.mktemp("pinned") / "model"
    pin(ModelParams(base=str(tiny_base)), corpus=folder, out=folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the stage `preprocess`, its training side."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "preprocess")


def preferences(count: int, seed: int = 0, vocabulary: int = 380) -> Iterator[dict[str, list[int]]]:
    """Prompts of random tokens; preferred is the prompt again, the other answer is random and of another length."""
    chance = random.Random(seed)
    for _ in range(count):
        prompt = [chance.randrange(3, vocabulary) for _ in range(chance.randrange(3, 8))]
        rejected = [chance.randrange(3, vocabulary) for _ in range(chance.randrange(2, 9))]
        yield {"prompt_ids": prompt, "chosen_ids": list(prompt), "rejected_ids": rejected}


def write_pairs(folder: Path, rows: list[dict[str, list[int]]]) -> Path:
    """Write preferences as the stage `preprocess` does, with the preferred answers as blocks of their own."""
    import pyarrow as pa

    def write(path: Path, content: list[dict[str, list[int]]]) -> None:
        schema = pa.schema([(name, pa.list_(pa.int32())) for name in content[0]])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(content, schema))

    blocks = []
    for row in rows:
        ids = row["prompt_ids"] + row["chosen_ids"]
        labels = [-100] * len(row["prompt_ids"]) + row["chosen_ids"]
        blocks.append({"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))})
    with commit_dir(folder) as out:
        write(out / "train-00000.arrow", blocks)
        write(out / "pairs-00000.arrow", rows)
        (out / "report.json").write_text(json.dumps({"schema_version": 1, "train_digest": digest_json(rows)}))
    return folder


@pytest.fixture(scope="session")
def make_preferences() -> Callable[[int], list[dict[str, list[int]]]]:
    """The function that makes so many preferences."""
    return lambda count: list(preferences(count))


@pytest.fixture(scope="session")
def write_preferences() -> Callable[[Path, list[dict[str, list[int]]]], Path]:
    """The function that writes preferences: (folder, rows)."""
    return write_pairs
