"""Rows of preferences: reading them without loading them, and telling which objective can learn from them.

A row is a prompt with a preferred answer, another one, or both: `prompt_ids`, `chosen_ids`, `rejected_ids`, of which one
of the answers is empty where the data judges single answers (KTO's form).
"""

import importlib.util
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DataError, RegraftError
from regraft.train.data import Blocks
from regraft.train.params import TrainParams

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def check_installed(objective: str) -> None:
    """Refuse an objective whose library is not there, before anything is loaded.

    Raises:
        RegraftError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise RegraftError(
            f"train.objective {objective} needs the package trl, which is not installed",
            fix="pip install '.[preference]' in the clone (`make install` does it), or set train.objective to supervised",
        )


def open_pairs(dataset: Path, objective: str) -> Blocks:
    """Open the preferences of the stage `preprocess`; `open_blocks` has checked every byte of its folder.

    Raises:
        DataError: there are no preferences, or not in the form that the objective needs.
    """
    files = sorted(dataset.glob("pairs-*.arrow"))
    if not files:
        raise DataError(
            f"train.objective is {objective}, but {dataset} holds no preferences (pairs-*.arrow)",
            fix="set data.layout to preference and prepare rows with `chosen` and `rejected` (or `completion` and "
            "`label`), or set train.objective to supervised",
        )
    import datasets

    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    single = _singles(rows)
    if single and objective != "kto":
        raise DataError(
            f"train.objective is {objective}, which compares two answers to a prompt, but {single} of {len(rows)} rows "
            "have one only",
            fix="set train.objective to kto",
        )
    if single == len(rows) and not (_any(rows, "chosen_ids") and _any(rows, "rejected_ids")):
        raise DataError(
            f"all {len(rows)} rows are judged alike: there is nothing to prefer", fix="add rows with the other label"
        )
    return Blocks(rows=rows, digest=read_json(dataset / "report.json")["train_digest"])


def reference_of(params: TrainParams, *, started: bool) -> str | None:
    """Say what rewards are measured against (see `PreferenceResult`); `started`: a start was taken out of the base."""
    if params.objective == "orpo":
        return None
    return params.parent_digest or ("start" if started else "base")


def parent_needed(params: TrainParams, resumed: Path | None) -> bool:
    """Say whether the parent's values are to be loaded before training: at the start, and where they are the reference."""
    return params.parent is not None and (resumed is None or params.objective in ("dpo", "kto"))


def _lengths(rows: Any, column: str) -> Any:
    import pyarrow.compute as pc

    return pc.list_value_length(rows.data.column(column))


def _any(rows: Any, column: str) -> bool:
    import pyarrow.compute as pc

    return bool(pc.max(_lengths(rows, column)).as_py())


def _singles(rows: Any) -> int:
    """Return how many rows have one answer only."""
    import pyarrow.compute as pc

    shorter: Any = pc.min_element_wise(_lengths(rows, "chosen_ids"), _lengths(rows, "rejected_ids"))
    return len(rows) - int(pc.sum(pc.greater(shorter, 0)).as_py() or 0)  # type: ignore[call-overload]
