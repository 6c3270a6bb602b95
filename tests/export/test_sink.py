"""Files that are written past the page cache."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from regraft.export import sink
from regraft.export.sink import LAG, Sink

PAGE = 4096
CHUNK = 4 * 2**20
SIZES = ([], [1], [PAGE], [PAGE - 1, 2], [CHUNK], [CHUNK - 1, 1, 1], [3 * CHUNK + 5], [7] * 50, [CHUNK // 3] * 20)


def written(path: Path, sizes: list[int]) -> bytes:
    pieces = [os.urandom(size) for size in sizes]
    with Sink(path) as file:
        for piece in pieces:
            file.put(memoryview(piece))
    whole = b"".join(pieces)
    assert file.sha256 == hashlib.sha256(whole).hexdigest()
    assert file.size == len(whole)
    return whole


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_byte_is_on_disk_and_digested(tmp_path: Path, sizes: list[int]) -> None:
    whole = written(tmp_path / "file", sizes)

    assert (tmp_path / "file").read_bytes() == whole


@pytest.mark.parametrize("refused_at", ["open", "write"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        pytest.skip("this system has no O_DIRECT")
    really, refusals = getattr(os, refused_at), []

    def refusing(what: object, *more: int) -> int:
        import fcntl

        flags = more[0] if refused_at == "open" else fcntl.fcntl(what, fcntl.F_GETFL)  # type: ignore[call-overload]
        if flags & direct:
            refusals.append(what)
            raise OSError(errno.EINVAL, "Invalid argument")
        done: int = really(what, *more)
        return done

    monkeypatch.setattr(sink.os, refused_at, refusing)
    whole = written(tmp_path / "file", [CHUNK + 3, 5])
    monkeypatch.undo()

    assert len(refusals) == 1
    assert (tmp_path / "file").read_bytes() == whole


def test_memory_may_be_used_again_after_as_many_pieces_as_are_promised(tmp_path: Path) -> None:
    buffers = [bytearray(1000) for _ in range(LAG + 1)]
    whole = hashlib.sha256()

    with Sink(tmp_path / "file") as file:
        for turn in range(5000):
            buffer = buffers[turn % len(buffers)]
            buffer[:] = turn.to_bytes(4, "little") * 250
            whole.update(buffer)
            file.put(memoryview(buffer))

    assert file.sha256 == whole.hexdigest()
    assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == file.sha256


def test_a_full_disk_is_an_error_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink.os, "write", full)
    piece = memoryview(bytes(CHUNK))

    with pytest.raises(OSError, match="No space left"), Sink(tmp_path / "file") as file:
        for _ in range(20):  # more than there are chunks: nothing waits for the one that failed
            file.put(piece)


def test_an_error_of_the_caller_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), Sink(tmp_path / "file") as file:
        file.put(memoryview(b"x"))
        raise ValueError("mine")


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    with pytest.raises(FileExistsError):
        Sink(tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == b"old"


def test_memory_in_pieces_is_refused_before_a_thread_has_it(tmp_path: Path) -> None:
    with pytest.raises(TypeError), Sink(tmp_path / "file") as file:
        file.put(memoryview(bytes(10))[::2])
