"""The processes that look at batches of rows: one for each core, here or of a Ray cluster; none where there is little to read.

Batches are given out and taken back in the order of the files, a few at a time: memory does not grow with the rows, and the
output is the same however many processes there are. One that is killed here ends the stage with an error, on a cluster its batch
is looked at again; all end with the stage.
"""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self

from regraft.cluster import ADDRESS, ClusterFuture, ClusterPool
from regraft.processes import collect_seldom, context, cores, explained, follow
from regraft.validate.cluster import cluster_pool
from regraft.validate.look import Looked, Looker
from regraft.validate.raw import RawRow
from regraft.validate.source import DataFile

_LITTLE = 8_000_000  # bytes of all files that one process reads as fast as several start
_AHEAD = 2  # batches that wait for each process
_inherited: dict[str, Looker] = {}  # what a process that looks holds


class Lookers:
    """Looks at batches, here, in processes of its own or on a cluster (`REGRAFT_RAY`); a context, which ends them.

    Args:
        looker: what is to be done with a batch.
        files: what will be read: whether it is worth a process is told by their size.
    """

    def __init__(self, looker: Looker, files: Sequence[DataFile]) -> None:
        self.looker = looker
        # A damaged link is found where it is read. A compressed file holds several times its size.
        sizes = [(f.path.stat().st_size if f.path.is_file() else 0) * (4 if f.compression else 1) for f in files]
        self._little = sum(sizes) <= _LITTLE
        self._processes = 1
        self._pool: ProcessPoolExecutor | ClusterPool | None = None

    def __enter__(self) -> Self:
        if self._little:
            return self
        if address := os.environ.get(ADDRESS, ""):
            self._pool = pool = cluster_pool(address, self.looker)
            self._processes = pool.workers
        elif (processes := cores()) > 1:
            self._processes = processes
            self._pool = ProcessPoolExecutor(
                processes, mp_context=context(), initializer=_begin, initargs=(self.looker, os.getpid())
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def look(self, name: str, batches: Iterable[list[RawRow]]) -> Iterator[tuple[list[RawRow], Looked]]:
        """Yield each batch of a file with what was found in it, in order.

        Raises:
            RegraftError: a process was killed, or nodes of the cluster died too often.
        """
        if self._pool is None:
            for batch in batches:
                yield batch, self.looker.look(name, batch)
            return
        waiting: deque[tuple[list[RawRow], Future[Looked] | ClusterFuture[Looked]]] = deque()
        with explained("looked at rows"):
            for batch in batches:
                waiting.append((batch, self._pool.submit(_look, name, batch)))
                if len(waiting) > _AHEAD * self._processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()


def _begin(looker: Looker, parent: int) -> None:
    follow(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    become_worker(looker)


def become_worker(looker: Looker) -> None:
    """Let this process, of a pool or of a cluster, be one that looks at batches."""
    collect_seldom()
    _inherited["looker"] = looker


def _look(name: str, batch: list[RawRow]) -> Looked:
    return _inherited["looker"].look(name, batch)
