"""A file that is digested and written past the page cache while its bytes are still being computed.

Two gigabytes cost a core half a second on their way through the page cache, 0.15 s past it, and nothing of them is read
again before the file is whole. So they go to the disk directly (`O_DIRECT`, open(2)), from page-aligned memory; on a file
system that has no such thing, through the cache.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

LAG = 8
"""Pieces that may still be read after they were handed over: that many more make the first of them free."""
_CHUNK = 4 * 2**20  # bytes of one write
_CHUNKS = 4  # one is filled, one is written, the others wait
_PAGE = 4096  # direct writes begin and end at multiples of a disk's block; no disk has larger ones
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux


class Sink:
    """One new file, from its first byte to its last; what is written is on disk when the block ends."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems make the file before they refuse
            self._file = os.open(path, flags, 0o666)
        self._digest = hashlib.sha256()
        self._errors: list[OSError] = []
        self.size = 0
        """Bytes that were handed over."""
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(LAG - 2)  # one more is copied, one handed over
        self._filled: queue.Queue[tuple[mmap.mmap, int] | None] = queue.Queue()
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        for _ in range(_CHUNKS):
            self._free.put(mmap.mmap(-1, _CHUNK))
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._gather, self._write)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        try:
            if kind is None and not self._errors:
                os.ftruncate(self._file, self.size)  # the last write was rounded up
                os.fsync(self._file)
        finally:
            os.close(self._file)
        if kind is None and self._errors:
            raise self._errors[0]

    @property
    def sha256(self) -> str:
        """Digest of what was written, once the block has ended."""
        return self._digest.hexdigest()

    def put(self, piece: memoryview) -> None:
        """Append the bytes of contiguous memory; they must stay as they are until `LAG` more pieces were appended.

        Raises:
            OSError: an earlier piece could not be written.
            TypeError: the memory is not contiguous.
        """
        if self._errors:
            raise self._errors[0]
        self.size += piece.nbytes
        self._pieces.put(piece.cast("B"))  # what a thread could not take would be waited for without end

    def _gather(self) -> None:
        """Digest pieces and copy them into chunks: a core does this while another computes."""
        chunk, used = self._free.get(), 0
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
            while piece:
                count = min(len(piece), _CHUNK - used)
                chunk[used : used + count] = piece[:count]
                piece, used = piece[count:], used + count
                if used == _CHUNK:
                    self._filled.put((chunk, used))
                    chunk, used = self._free.get(), 0
        self._filled.put((chunk, used))
        self._filled.put(None)

    def _write(self) -> None:
        while (filled := self._filled.get()) is not None:
            chunk, used = filled
            if not self._errors:  # else the computing side sees the error at its next piece
                try:
                    self._write_all(memoryview(chunk)[: -(-used // _PAGE) * _PAGE])
                except OSError as error:
                    self._errors.append(error)
            self._free.put(chunk)

    def _write_all(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)  # refused here, or what is left is no block
