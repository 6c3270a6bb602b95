"""Blocks that are read before they are asked for."""

import threading
from pathlib import Path

import pytest

from regraft.errors import DamagedArtifact
from regraft.export.ahead import AheadReader
from regraft.export.tensors import Planned, Reader, Writer

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    import torch

    with Writer(tmp_path / "model.safetensors", [Planned(name, "F32", (50, 8)) for name in NAMES]) as writer:
        for seed in range(len(NAMES)):
            writer.block(torch.rand(50, 8, generator=torch.Generator().manual_seed(seed)))
    return tmp_path / "model.safetensors"


def read(reader: Reader, names: list[str], elements: int = 7 * 8) -> list[tuple[str, int, list[float]]]:
    return [(name, first, block.ravel().tolist()) for name in names for first, block in reader.blocks(name, elements)]


@pytest.mark.parametrize(
    "asked", [NAMES, ["b", "a"], ["a", "a", "b"], ["c"], [*NAMES, *NAMES], ["b", "b", "c", "a", "d"]], ids="".join
)
def test_whatever_is_asked_for_is_what_a_reader_reads(
    path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader.blocks, "__defaults__", (7 * 8,))

    with Reader(path) as plain, AheadReader(path, NAMES) as ahead:
        assert read(ahead, asked) == read(plain, asked)
        assert ahead.whole("d").equal(plain.whole("d"))


def test_blocks_of_another_size_than_those_read_ahead_are_right(path: Path) -> None:
    with Reader(path) as plain, AheadReader(path, NAMES) as ahead:
        assert read(ahead, NAMES) == read(plain, NAMES)


def test_the_thread_reads_what_is_asked_for_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader.blocks, "__defaults__", (7 * 8,))
    readers = set()
    really = Reader._read

    def noted(self: Reader, name: str, first: int, rows: int) -> object:
        readers.add(threading.current_thread())
        return really(self, name, first, rows)

    monkeypatch.setattr(Reader, "_read", noted)
    with AheadReader(path, NAMES) as ahead:
        read(ahead, NAMES)

    assert threading.current_thread() not in readers
    assert len(readers) == 1


def test_an_error_is_that_of_who_asks(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedArtifact):
        AheadReader(path, NAMES)

    # A file that shrinks later: the thread stops, and the block that is not there is an error when it is asked for.
    path.unlink()
    import torch

    with Writer(path, [Planned(name, "F32", (500_000,)) for name in NAMES]) as writer:
        for _ in NAMES:
            writer.block(torch.ones(500_000))
    with AheadReader(path, NAMES) as ahead:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4)
        with pytest.raises(DamagedArtifact, match="ended while d was read"):
            read(ahead, NAMES, 2**19)  # as the thread reads: all but d came from it


def test_one_that_is_closed_early_leaves_no_thread_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader.blocks, "__defaults__", (8,))
    before = threading.active_count()

    with AheadReader(path, NAMES) as ahead:
        next(iter(ahead.blocks("a")))

    assert threading.active_count() == before
