"""The fingerprint of the raw data, and one event for one change."""

import os
import time
from pathlib import Path

import pytest

from regraft.errors import Busy, ServiceUnavailable
from regraft.layout import Layout
from regraft.watch import Poll, fingerprint, poll, raw_files

RAW = ["data/raw"]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/a.jsonl").write_text("one\n")
    return Layout(tmp_path)


class Server:
    """Keeps the events it got; refuses while `down`."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.down = False

    def emit(self, digest: str, event: str) -> None:
        if self.down:
            raise ServiceUnavailable("no")
        self.got.append((digest, event))


def look(layout: Layout, server: Server, *, settle: float = 0, trained: str | None = None) -> Poll:
    return poll(layout, RAW, settle=settle, trained=trained, emit=server.emit)


def test_raw_files_are_those_of_folders_globs_and_names_without_hidden_and_half_written_ones(tmp_path: Path) -> None:
    for name in (
        "raw/a.jsonl",
        "raw/sub/b.csv",
        "raw/.hidden",
        "raw/c.jsonl.part",
        "more/x.csv",
        "more/y.txt",
        "one.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = raw_files(tmp_path, ["raw", "more/*.csv", "one.csv", "nowhere"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "more/x.csv",
        "one.csv",
        "raw/a.jsonl",
        "raw/sub/b.csv",
    ]


def test_the_fingerprint_depends_on_names_and_bytes_and_not_on_times(layout: Layout) -> None:
    before = fingerprint(layout, RAW).digest
    os.utime(layout.root / "data/raw/a.jsonl", (1, 1))
    assert fingerprint(layout, RAW).digest == before
    (layout.root / "data/raw/a.jsonl").write_text("two\n")
    changed = fingerprint(layout, RAW).digest
    (layout.root / "data/raw/a.jsonl").rename(layout.root / "data/raw/b.jsonl")
    assert len({before, changed, fingerprint(layout, RAW).digest}) == 3


def test_a_file_that_did_not_change_is_not_read_again(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(layout, RAW)

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("regraft.watch.digest_file", read)
    assert fingerprint(layout, RAW).digest == first.digest


def test_a_change_is_told_once_however_often_one_looks(layout: Layout) -> None:
    server = Server()
    assert [look(layout, server).emitted for _ in range(3)] == [True, False, False]
    (layout.root / "data/raw/b.jsonl").write_text("two\n")
    assert [look(layout, server).emitted for _ in range(3)] == [True, False, False]
    assert len(server.got) == len({digest for digest, _ in server.got}) == len({event for _, event in server.got}) == 2


def test_an_event_that_was_not_taken_is_sent_again_with_the_same_id(layout: Layout) -> None:
    server = Server()
    ids: list[str] = []

    def fails(digest: str, event: str) -> None:
        ids.append(event)
        raise ServiceUnavailable("no")

    for _ in range(2):
        with pytest.raises(ServiceUnavailable):
            poll(layout, RAW, settle=0, trained=None, emit=fails)
    look(layout, server)
    assert ids == [server.got[0][1]] * 2


def test_data_that_came_back_after_another_change_is_a_new_event(layout: Layout) -> None:
    server = Server()
    for text in ("one\n", "two\n", "one\n"):
        (layout.root / "data/raw/a.jsonl").write_text(text)
        look(layout, server)
    digests = [digest for digest, _ in server.got]
    assert digests[0] == digests[2] != digests[1]
    assert len({event for _, event in server.got}) == 3


def test_a_file_is_left_until_it_has_settled_even_if_it_brought_an_old_time_along(layout: Layout) -> None:
    server = Server()
    new = layout.root / "data/raw/b.jsonl"
    new.write_text("half")
    for path in (new, layout.root / "data/raw/a.jsonl"):
        os.utime(path, (1, 1))
    assert not look(layout, server, settle=0.3).emitted
    time.sleep(0.35)
    assert look(layout, server, settle=0.3).emitted


def test_data_that_a_retraining_ended_with_needs_no_event(layout: Layout) -> None:
    server = Server()
    assert not look(layout, server, trained=fingerprint(layout, RAW).digest).emitted
    assert server.got == []


def test_an_empty_folder_is_no_change(layout: Layout) -> None:
    (layout.root / "data/raw/a.jsonl").unlink()
    assert look(layout, Server()).why == "no file yet in data/raw"


def test_two_watchers_do_not_both_tell(layout: Layout) -> None:
    def meanwhile(digest: str, event: str) -> None:
        with pytest.raises(Busy):
            look(layout, Server())

    assert poll(layout, RAW, settle=0, trained=None, emit=meanwhile).emitted
