"""A base that is only a tokenizer, and accepted rows as `validate` writes them."""

import hashlib
import json
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the stage `model` for a base whose weights nobody reads."""
    import tiny

    from regraft.artifacts import commit_dir, digest_json
    from regraft.model.pin import TOKENIZER_FILES, digest_files
    from regraft.model.report import BaseReport

    root = tmp_path_factory.mktemp("tokenizer-base")
    weights = root / "weights"
    tiny.make_tokenizer().save_pretrained(weights)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    with commit_dir(root / "model") as folder:
        BaseReport(
            source="folder",
            base=str(weights),
            name="tiny",
            revision=None,
            path=str(weights),
            digest="0" * 64,
            tokenizer_digest=digest_json(digest_files(weights, TOKENIZER_FILES)),
            files={},
            parameters=0,
            dtype="float32",
            architecture="LlamaForCausalLM",
        ).save(folder / "report.json")
    return root / "model"


@pytest.fixture
def write_rows(tmp_path: Path, fill: Callable[..., Path]) -> Callable[..., Path]:
    """Write rows to `rows.parquet` in a new folder and return the folder."""
    return partial(fill, tmp_path)


@pytest.fixture(scope="session")
def fill() -> Callable[..., Path]:
    """Write rows to `rows.parquet` in a new folder of one that is named, and return the new one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(parent: Path, rows: list[dict[str, Any]], name: str = "validate", source: str = "a.jsonl") -> Path:
        from regraft.artifacts import canonical_json

        folder = parent / name
        folder.mkdir()
        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        schema = pa.schema(
            [
                ("row_id", pa.string()),
                ("source", pa.string()),
                ("line", pa.int64()),
                ("messages", pa.list_(message)),
                ("slices", pa.map_(pa.string(), pa.string())),
                ("at", pa.string()),
                ("id", pa.string()),
            ]
        )
        full = []
        for line, row in enumerate(rows, 1):
            slices = row.get("slices", {})
            content = canonical_json({"messages": row["messages"], "slices": slices})
            full.append(
                {
                    "row_id": hashlib.sha256(content).hexdigest()[:32],
                    "source": source,
                    "line": line,
                    "messages": row["messages"],
                    "slices": sorted(slices.items()),
                    "at": row.get("at"),
                    "id": None,
                }
            )
        pq.write_table(pa.Table.from_pylist(full, schema), folder / "rows.parquet")
        return folder

    return write


def chat_row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Three hundred different questions with answers of different lengths, a tenth of them phrased as never trained on."""
    dice = random.Random(1)
    made = []
    for i in range(300):
        item = dice.choice(["lamp", "sofa", "desk", "chair"])
        question = f"where is my {item} number {i} " + "please " * dice.randrange(12)
        answer = json.dumps({"action": dice.choice(["track_order", "cancel_order"]), "item": item})
        phrasing = "unseen" if i % 10 == 0 else "seen"
        made.append(chat_row(question.strip(), answer, slices={"phrasing": phrasing, "item": item}, at="2026-09-01"))
    return made


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Each verification of an entry of a cache from now on: its name, and whether the main thread did it."""
    from regraft.preprocess.shards import Cache

    found: list[tuple[str, bool]] = []
    real = Cache.find

    def find(self: Cache, digest: str) -> Path | None:
        found.append((digest, threading.current_thread() is threading.main_thread()))
        return real(self, digest)

    monkeypatch.setattr(Cache, "find", find)
    return found
