"""Clones whose stages have run, and an empty MLflow store for each test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture
def clone(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Make the present adapter of a clone with a store of its own: `clone(adapter="two", champion=digest)`."""
    import clones

    for name in ("MLFLOW_TRACKING_URI", "REGRAFT_FAILPOINT"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "a clone"
    clones.copy_store(empty_store, root)
    return partial(clones.make, root)
