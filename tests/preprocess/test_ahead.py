"""What the last run used is verified while this one reads, once, and by a thread that no process is forked beside."""

import json
import threading
import time
from pathlib import Path

import pytest

from regraft.preprocess.ahead import Ahead
from regraft.preprocess.shards import Cache


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    """A cache of the entries a, b and c, noted in this order for "this"."""
    found = Cache(tmp_path / "cache")
    for name in "abc":
        with found.make(name) as folder:
            (folder / "bytes").write_bytes(name.encode() * 100)
    found.keep(["a", "b", "c"], spare=0, purpose="this")
    return found


def finished(ahead: Ahead) -> None:
    deadline = time.monotonic() + 60
    while not all(future.done() for future in ahead._begun.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_noted_is_verified_once_and_in_order(store: Cache, verified: list[tuple[str, bool]]) -> None:
    ahead = Ahead(store, "this")
    finished(ahead)
    assert [ahead.find(name) for name in "cab"] == [store.root / name for name in "cab"]
    ahead.end()
    assert verified == [("a", False), ("b", False), ("c", False)]


def test_a_flipped_byte_is_found_ahead_too(store: Cache) -> None:
    (store.root / "b/bytes").write_bytes(b"b" * 99 + b"c")
    ahead = Ahead(store, "this")
    finished(ahead)
    assert [ahead.find(name) is None for name in "abcd"] == [False, True, False, True]
    ahead.end()


def test_what_the_thread_has_not_begun_the_caller_verifies(
    store: Cache, verified: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    going, go = threading.Event(), threading.Event()
    find = Cache.find

    def slowly(self: Cache, digest: str) -> Path | None:
        if threading.current_thread() is not threading.main_thread():
            going.set()
            assert go.wait(60)
        return find(self, digest)

    monkeypatch.setattr(Cache, "find", slowly)
    ahead = Ahead(store, "this")
    assert going.wait(60)
    assert [ahead.find(name) for name in "bc"] == [store.root / name for name in "bc"]
    assert verified == [("b", True), ("c", True)]
    go.set()
    assert ahead.find("a") == store.root / "a"
    ahead.end()
    assert verified[2:] == [("a", False)]


def test_its_end_keeps_what_was_verified_and_leaves_the_rest_to_the_caller(
    store: Cache, verified: list[tuple[str, bool]]
) -> None:
    ahead = Ahead(store, "this")
    finished(ahead)
    ahead.end()
    assert ahead.find("a") == store.root / "a"
    assert ahead._threads is None
    assert ("a", True) not in verified
    assert ahead.find("a") == store.root / "a"  # asked again it is verified again
    assert verified[-1] == ("a", True)


@pytest.mark.parametrize(
    "note", [None, "{", "[]", '{"purpose": "this"}', '{"purpose": "this", "used": [1]}', '{"purpose": "other", "used": ["a"]}']
)  # fmt: skip
def test_without_a_note_for_the_purpose_there_is_no_thread(store: Cache, note: str | None) -> None:
    path = store.root / "last.json"
    path.unlink()
    if note is not None:
        path.write_text(note)
    ahead = Ahead(store, "this")
    assert ahead._threads is None
    assert ahead.find("a") == store.root / "a"
    ahead.end()


def test_the_note_stays_where_entries_go(store: Cache) -> None:
    store.keep(["b"], spare=0, purpose="that")
    assert sorted(path.name for path in store.root.iterdir()) == ["b", "last.json"]
    assert json.loads((store.root / "last.json").read_text()) == {"purpose": "that", "used": ["b"]}
    assert (store.noted("that"), store.noted("this")) == (["b"], [])
