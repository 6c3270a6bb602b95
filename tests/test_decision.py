"""When a change of the data is worth a training; the registry is replaced, the rows are real."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import regraft.parent
import regraft.settings
from regraft import decision
from regraft.artifacts import digest_json
from regraft.decision import changed_parameters, decide, heed, rows_of
from regraft.errors import MissingInput
from regraft.layout import Layout
from regraft.register.version import FORGET_TAG, Version
from regraft.settings import Settings

SECTIONS: dict[str, Any] = {
    name: {}
    for name in ("data", "model", "validate", "preprocess", "evaluate", "gates", "register", "promote", "export")
}


def parameters(*, train: dict[str, Any] | None = None, **limits: float) -> Settings:
    return Settings.model_validate(
        {**SECTIONS, "train": {"max_steps": 1, **(train or {})}, "retrain": {"decide": limits}}
    )


def write(path: Path, questions: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        {
            "row_id": pa.string(),
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "slices": pa.map_(pa.string(), pa.string()),
            "id": pa.string(),
        }
    )
    rows = [
        {
            "row_id": digest_json(text)[:32],
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}],
            "slices": [],
            "id": None,
        }
        for text in questions
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


class Clone:
    """Accepted rows, and a champion that was made from others."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layout = Layout(root)
        self.champion: Version | None = Version("regraft", 7, "", "", "", 0)
        self.made = parameters().model_dump(mode="json", by_alias=True)
        self.old: list[Path] = [write(root / "cache/rows", [f"where is order {i}" for i in range(100)])]
        self.has(100)
        monkeypatch.setattr(decision, "find_champion", lambda params, layout: self.champion)
        monkeypatch.setattr(decision, "find_version", lambda params, layout, which: self.champion)
        monkeypatch.setattr(decision, "_lineage", lambda version: {"params": self.made})
        monkeypatch.setattr(decision, "outputs", lambda *_: self.old)
        monkeypatch.setattr(decision, "cache_of", lambda layout: None)

    def has(self, rows: int) -> None:
        write(self.layout.stage("validate") / "rows.parquet", [f"where is order {i}" for i in range(rows)])


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    return Clone(tmp_path, monkeypatch)


def test_without_a_champion_there_is_nothing_to_compare_with(clone: Clone) -> None:
    clone.champion = None
    found = decide(clone.layout, parameters(min_rows=1_000))
    assert (found.action, found.lines) == ("train", [])


def test_by_default_every_change_is_trained_on_and_told(clone: Clone) -> None:
    clone.has(101)
    found = decide(clone.layout, parameters())
    assert (found.action, found.champion) == ("train", 7)
    assert found.lines[0] == (
        "Against the data of version 7: 100 rows before, 101 after: 100 the same, 1 new, 0 changed, 0 removed."
    )
    assert found.lines[1] == "Trained: 1 row differs, 1.00% of the champion's."


@pytest.mark.parametrize(
    ("rows", "limits", "action"),
    [
        (104, {"min_rows": 5}, "skip"),
        (105, {"min_rows": 5}, "train"),
        (95, {"min_rows": 5}, "train"),  # removed rows count
        (96, {"min_rows": 5}, "skip"),
        (104, {"min_share": 0.05}, "skip"),
        (105, {"min_share": 0.05}, "train"),
        (105, {"min_rows": 5, "min_share": 0.06}, "skip"),  # both are asked for
        (110, {"continue_below": 0.1}, "continue"),
        (111, {"continue_below": 0.1}, "train"),
        (104, {"min_rows": 5, "continue_below": 0.5}, "skip"),
    ],
)
def test_thresholds_say_what_becomes_of_a_change(
    clone: Clone, rows: int, limits: dict[str, float], action: str
) -> None:
    clone.has(rows)
    found = decide(clone.layout, parameters(**limits))
    assert found.action == action
    assert (
        (found.lines[-1].split(":")[0])
        == {
            "skip": "Not trained",
            "train": "Trained",
            "continue": "Training goes on from the champion",
        }[action]
    )


def test_changed_parameters_are_trained_with_however_little_the_data_changed(clone: Clone) -> None:
    clone.has(101)
    found = decide(clone.layout, parameters(train={"rank": 4}, min_rows=50, continue_below=0.5))
    assert (found.action, found.lines[-1]) == ("train", "Trained: train.rank changed since the champion.")
    assert changed_parameters(clone.made, parameters(train={"parent": "a", "parent_digest": "b" * 64})) == []


def test_with_the_same_rows_something_else_is_why(clone: Clone) -> None:
    found = decide(clone.layout, parameters(min_rows=50, continue_below=0.5))
    assert (found.action, found.lines) == ("train", [])


def test_rows_that_cannot_be_compared_are_trained_on_and_the_reason_is_said(clone: Clone) -> None:
    clone.has(101)
    clone.old = []
    found = decide(clone.layout, parameters(min_rows=50))
    assert found.action == "train"
    assert found.lines == [
        "The data cannot be compared with the champion's: "
        "the rows of version 7 are neither in data/work/validate nor in DVC's cache"
    ]
    with pytest.raises(MissingInput, match="dvc fetch"):
        rows_of(clone.layout, parameters(), "champion")


def test_what_would_be_decided_is_said_once_the_rows_are_there(clone: Clone) -> None:
    clone.has(101)
    assert decision.foreseen(clone.layout, parameters(), ["preprocess", "train"])[1].startswith("Trained: 1 row")
    assert decision.foreseen(clone.layout, parameters(), ["validate", "preprocess", "train"]) == []
    assert decision.foreseen(clone.layout, parameters(), ["verdict", "export"]) == []


@pytest.mark.parametrize(
    ("rows", "limits", "before", "wanted"),
    [
        (105, {"continue_below": 0.1}, None, ["7"]),
        (105, {"continue_below": 0.1}, "data/parents/x/adapter", ["7"]),
        (120, {"continue_below": 0.1}, "data/parents/x/adapter", [None]),
        (120, {"continue_below": 0.1}, None, []),
        (105, {}, "data/parents/x/adapter", []),  # a person's parent
        (100, {"continue_below": 0.1}, "data/parents/x/adapter", []),  # the champion itself went on from it
        (105, {"continue_below": 0.1, "min_rows": 6}, None, []),
    ],
)
def test_the_parent_is_written_where_the_thresholds_ask_for_it(
    clone: Clone,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    limits: dict[str, float],
    before: str | None,
    wanted: list[str | None],
) -> None:
    written: list[str | None] = []
    train = {} if before is None else {"parent": before, "parent_digest": "a" * 64}
    settings = parameters(train=train, **limits)
    monkeypatch.setattr(regraft.parent, "set_parent", lambda layout, parameters, which: written.append(which))
    monkeypatch.setattr(regraft.settings, "load", lambda layout: settings)
    clone.has(rows)
    assert heed(clone.layout, settings, decide(clone.layout, settings)) is settings
    assert written == wanted


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize("rows", [99, 100])
@pytest.mark.parametrize("limits", [{"min_rows": 50}, {"min_share": 0.5}, {"continue_below": 0.5}])
def test_a_champion_that_learnt_what_is_to_be_forgotten_is_replaced_afresh_however_little_differs(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], rows: int, comparable: bool
) -> None:
    clone.champion = Version("regraft", 7, "", "", "", 0, tags={FORGET_TAG: "1 row"})
    clone.has(rows)
    if not comparable:
        clone.old = []
    written: list[str | None] = []
    settings = parameters(train={"parent": "data/parents/x/adapter", "parent_digest": "a" * 64}, **limits)
    monkeypatch.setattr(regraft.parent, "set_parent", lambda layout, parameters, which: written.append(which))
    monkeypatch.setattr(regraft.settings, "load", lambda layout: settings)
    found = decide(clone.layout, settings)
    assert found.action == "train"
    assert not comparable or found.lines[1] == "Trained: version 7 learnt from rows that are to be forgotten."
    heed(clone.layout, settings, found)
    assert written == ([None] if "continue_below" in limits else []), "a person's parent is a person's"
