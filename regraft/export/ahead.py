"""A file of tensors whose next block is read by a thread while the present one is worked on."""

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import RegraftError
from regraft.export.tensors import RING, Reader

if TYPE_CHECKING:
    import torch

_Ready = tuple[tuple[str, int, int], "torch.Tensor"]


class AheadReader(Reader):
    """A `Reader` of tensors that will be asked for in `order`, block by block; any other is read when it is asked for."""

    def __init__(self, path: Path, order: Sequence[str]) -> None:
        super().__init__(path)
        self._beside, self._order = Reader(path), order
        # RING buffers: one is filled, one handed over, one worked on, the others wait.
        self._ready: queue.Queue[_Ready | None] = queue.Queue(RING - 3)
        self._next: _Ready | None = None
        self._ended = self._closing = False
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the file."""
        self._closing = True
        while self._thread.is_alive():
            if not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.001)
        self._beside.close()
        super().close()

    def _read_all(self) -> None:
        with suppress(OSError, RegraftError):  # who asks for that block reads it, and gets the error
            for name in self._order:
                for first, block in self._beside.blocks(name):
                    self._ready.put(((name, first, len(block)), block))
                    if self._closing:
                        return
        self._ready.put(None)

    def _read(self, name: str, first: int, rows: int) -> "torch.Tensor":
        if self._next is None and not self._ended:
            self._next = self._ready.get()
            self._ended = self._next is None
        if self._next is not None and self._next[0] == (name, first, rows):
            block, self._next = self._next[1], None
            return block
        return super()._read(name, first, rows)
