import json
import logging
from pathlib import Path

import pytest

from regraft.artifacts import write_json
from regraft.errors import Busy, ResumeRefused
from regraft.train.checkpoint import Checkpoints, differences

INPUTS = {"train": {"rank": 8}, "data": "d1"}


def _opened(root: Path, inputs: dict[str, object] = INPUTS) -> Checkpoints:
    store = Checkpoints(root, inputs)
    with store.opened():
        store.rewind_metrics(None)
    return store


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    for step in (900, 1_000_000, 20):
        store.save(step, {"adapter": b"x"})

    assert store.newest() == store.folder / "step-1000000"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = _opened(tmp_path)
    store.save(1, {"adapter": b"older"})
    newest = store.save(2, {"adapter": b"newer"})
    if damage == "flip":
        (newest / "adapter").write_bytes(b"newes")
    elif damage == "truncate":
        (newest / "adapter").write_bytes(b"new")
    else:
        (newest / {"remove": "adapter", "manifest": "manifest.json"}[damage]).unlink()

    with caplog.at_level(logging.WARNING):
        assert store.newest() == store.folder / "step-000001"
    assert "step-000002" in caplog.text


def test_other_inputs_look_into_another_folder_and_the_change_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _opened(tmp_path).save(1, {"adapter": b"x"})

    with caplog.at_level(logging.WARNING):
        other = _opened(tmp_path, {"train": {"rank": 16}, "data": "d1"})

    assert other.newest() is None
    assert "train.rank: 8, now 16" in caplog.text


def test_a_folder_whose_key_names_other_inputs_is_refused_with_what_changed(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    key = json.loads((store.folder / "key.json").read_text())
    key["inputs"]["data"] = "d2"
    write_json(store.folder / "key.json", key)

    with pytest.raises(ResumeRefused, match='data: "d2", now "d1"') as refusal:
        _opened(tmp_path)
    assert refusal.value.fix == f"to start afresh: rm -r {store.folder}"


def test_a_second_trainer_of_the_same_inputs_is_told_to_wait(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, INPUTS)

    with store.opened(), pytest.raises(Busy, match="is busy"), Checkpoints(tmp_path, INPUTS).opened():
        pass


def test_metrics_go_back_in_place_to_what_they_were_at_the_checkpoint(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    store.metrics.write_bytes(b"one\n")
    checkpoint = store.save(1, {})
    with store.metrics.open("ab") as file:
        file.write(b"two\nthr")
    inode = store.metrics.stat().st_ino

    store.rewind_metrics(checkpoint)

    assert store.metrics.read_bytes() == b"one\n"
    assert store.metrics.stat().st_ino == inode


def test_lost_metrics_are_restored_from_the_checkpoint(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    store.metrics.write_bytes(b"one\n")
    checkpoint = store.save(1, {})
    store.metrics.unlink()

    store.rewind_metrics(checkpoint)

    assert store.metrics.read_bytes() == b"one\n"


def test_finishing_removes_only_other_runs_that_had_finished(tmp_path: Path) -> None:
    finished, unfinished, last = (_opened(tmp_path, {"data": name}) for name in ("a", "b", "c"))
    finished.finish()
    last.finish()

    assert not finished.folder.exists()
    assert unfinished.folder.exists()
    assert last.folder.exists()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    for step in (2, 4, 10):
        store.save(step, {})

    store.prune(2)

    assert sorted(folder.name for folder in store.folder.glob("step-*")) == ["step-000004", "step-000010"]


def test_differences_name_each_leaf() -> None:
    before = {"a": {"b": 1, "c": 2}, "d": [1]}

    assert differences(before, {"a": {"b": 1, "c": 3}, "e": 4}) == [
        "a.c: 2, now 3",
        "d: [1], now null",
        "e: null, now 4",
    ]
