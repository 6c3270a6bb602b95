"""A stage run on lines written for the test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.report import ValidateReport
from regraft.validate.validate import validate


class Stage:
    """A folder with raw files, and the outputs of the stage run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "data/raw").mkdir(parents=True)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / "data/raw" / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, data: dict[str, Any] | None = None, **params: Any) -> ValidateReport:
        return validate(
            ValidateParams.model_validate({"expectations": {"quarantined": {"share": 1.0}}} | params),
            DataParams.model_validate(data or {}),
            raw_root=self.root,
            out=self.root / "out",
            docs=self.root / "docs",
        )

    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.root / "out/rows.parquet").to_pylist()

    def quarantine(self) -> list[dict[str, Any]]:
        return pq.read_table(self.root / "out/quarantine.parquet").to_pylist()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def chat() -> Callable[..., str]:
    """Return the line of a conversation: `chat("question", "answer", id="r-1")`."""

    def line(user: str, assistant: str = "yes", **columns: Any) -> str:
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return json.dumps({"messages": messages, **columns}) + "\n"

    return line
