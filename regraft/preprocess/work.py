"""The processes that look at shards and prepare them: one for each core, or none where there is little to do.

They are forked where that is safe (Linux), so that they share what was imported; each holds one shard in memory. One that
is killed, by the system for want of memory say, ends the stage with an error; all end with the process that started them.
"""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from regraft.chat import open_chat
from regraft.errors import RegraftError
from regraft.preprocess.cluster import ADDRESS, ClusterFuture, ClusterPool
from regraft.preprocess.keys import load_keys, read_keys
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.shard import Preparer
from regraft.preprocess.shards import Cache, Shard

if TYPE_CHECKING:
    import numpy as np

    from regraft.model.load import Base

log = logging.getLogger("regraft.preprocess")
_LITTLE = 4_096  # rows that one process does as fast as several
_inherited: dict[str, Any] = {}  # what a forked process finds


class Workers:
    """Does the work on shards; a context, which ends its processes."""

    def __init__(self, params: PreprocessParams, base: "Base", path: Path, store: Cache) -> None:
        self._params, self._base, self._path, self._store = params, base, path.absolute(), store
        self.tokenizer: Any = None
        self.made = 0
        self._pool: ProcessPoolExecutor | ClusterPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def load_tokenizer(self) -> None:
        """Load the base's tokenizer, once."""
        if self.tokenizer is None:
            from regraft.model import load

            self.tokenizer = load.load_tokenizer(self._base)

    def look(self, shards: Sequence[Shard], entries: Sequence[str]) -> None:
        """Make the entries of keys that are not there; meanwhile load the tokenizer."""
        missing = self._missing(shards, entries)
        tasks = [(shards[i], entries[i]) for i in missing]
        if sum(shards[i].rows for i in missing) <= _LITTLE:
            for shard, entry in tasks:
                _look(self._path, shard, self._params, self._store, entry)
            return
        pool = self._start()
        futures = [pool.submit(_look, self._path, shard, self._params, self._store, entry) for shard, entry in tasks]
        self.load_tokenizer()
        self._gather(futures, "looked at")
        self._end()  # the next ones are to have the tokenizer

    def prepare(
        self,
        shards: Sequence[Shard],
        entries: Sequence[str],
        keys: Sequence[str],
        fates: "np.ndarray",
        copies: "np.ndarray | None" = None,
    ) -> None:
        """Make the prepared entries that are not there; `copies` says how often each row is trained on, None once."""
        missing = self._missing(shards, entries)
        self.made = len(missing)
        if not missing:
            return
        self.load_tokenizer()
        tasks = [
            (
                shards[i],
                keys[i],
                fates[shards[i].first : shards[i].end],
                None if copies is None else copies[shards[i].first : shards[i].end],
                entries[i],
            )
            for i in sorted(missing, key=lambda i: -shards[i].rows)  # the longest first: all cores end together
        ]
        if sum(shards[i].rows for i in missing) <= _LITTLE or len(missing) == 1:
            preparer = Preparer(open_chat(self.tokenizer), self.tokenizer, self._params)
            for shard, key, some, often, entry in tasks:
                _prepare(preparer, self._path, shard, self._store, key, some, often, entry)
            return
        pool = self._start()
        futures = [pool.submit(_prepare_there, self._path, s, self._store, k, f, c, e) for s, k, f, c, e in tasks]
        self._gather(futures, "made")

    def _missing(self, shards: Sequence[Shard], entries: Sequence[str]) -> list[int]:
        """Return which entries are not there whole; hashing leaves the interpreter's lock."""
        with ThreadPoolExecutor(_cores()) as threads:
            found = list(threads.map(self._store.find, entries))
        return [i for i, folder in enumerate(found) if folder is None and shards[i].rows]

    def _start(self) -> "ProcessPoolExecutor | ClusterPool":
        if address := os.environ.get(ADDRESS, ""):
            self._pool = ClusterPool(address, self._params, self._base)
            return self._pool
        way = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(way)
        if way == "fork":
            _inherited["tokenizer"] = self.tokenizer
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process
        self._pool = ProcessPoolExecutor(
            _cores(), mp_context=context, initializer=_begin, initargs=(self._params, self._base, os.getpid())
        )
        return self._pool

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        _inherited.clear()

    def _gather(self, futures: "Sequence[Future[None] | ClusterFuture]", what: str) -> None:
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                log.debug("preprocess: %d of %d shards %s", done, len(futures), what)
        except BrokenProcessPool as error:
            raise RegraftError(
                "a process that prepared rows was killed, probably for want of memory",
                fix="free some memory, or set REGRAFT_WORKERS to fewer processes, and run the same command again",
            ) from error


def _cores() -> int:
    """Return how many processes to start: the cores that this one may use, or what REGRAFT_WORKERS says."""
    given = os.environ.get("REGRAFT_WORKERS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(params: PreprocessParams, base: "Base", parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter is told, and ends them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(200_000, 50, 100)  # rows hold no cycles to look for
    _inherited.update(params=params, base=base)


def become_worker(params: PreprocessParams, base: "Base") -> None:
    """Let this process, of a cluster, be one that prepares shards with these parameters."""
    _inherited.clear()
    _inherited.update(params=params, base=base)


def _look(path: Path, shard: Shard, params: PreprocessParams, store: Cache, entry: str) -> None:
    with store.make(entry) as folder:
        read_keys(path, shard, params, folder)


def _prepare(
    preparer: Preparer,
    path: Path,
    shard: Shard,
    store: Cache,
    keys: str,
    fates: "np.ndarray",
    copies: "np.ndarray | None",
    entry: str,
) -> None:
    chosen = fates.copy()
    with store.make(entry) as folder:
        preparer.prepare(path, shard, load_keys(store.folder(keys)).keys, chosen, folder, copies)


def _prepare_there(
    path: Path,
    shard: Shard,
    store: Cache,
    keys: str,
    fates: "np.ndarray",
    copies: "np.ndarray | None",
    entry: str,
) -> None:
    """Prepare a shard in a process of the pool."""
    if "preparer" not in _inherited:
        if _inherited.get("tokenizer") is None:
            from regraft.model import load

            _inherited["tokenizer"] = load.load_tokenizer(_inherited["base"])
        tokenizer = _inherited["tokenizer"]
        _inherited["preparer"] = Preparer(open_chat(tokenizer), tokenizer, _inherited["params"])
    _prepare(_inherited["preparer"], path, shard, store, keys, fates, copies, entry)
