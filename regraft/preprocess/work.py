"""The processes that look at shards and prepare them: one for each core, or none where there is little to do.

They are forked where that is safe (Linux), so that they share what was imported; each holds one shard in memory. One that
is killed, by the system for want of memory say, ends the stage with an error; all end with the process that started them.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from regraft.chat import open_chat
from regraft.cluster import ADDRESS, ClusterFuture, ClusterPool
from regraft.preprocess.ahead import Ahead
from regraft.preprocess.cluster import cluster_pool
from regraft.preprocess.keys import load_keys, read_keys
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.shard import Preparer
from regraft.preprocess.shards import Cache, Shard
from regraft.preprocess.tokenizer import open_tokenizer
from regraft.processes import FORKED, collect_seldom, context, cores, explained, follow

if TYPE_CHECKING:
    import numpy as np

    from regraft.model.load import Base

log = logging.getLogger("regraft.preprocess")
_LITTLE = 4_096  # rows that one process does as fast as several
_inherited: dict[str, Any] = {}  # what a forked process finds


@dataclass(frozen=True)
class _Task:
    """One shard to prepare."""

    path: Path
    """`rows.parquet`."""
    shard: Shard
    store: Cache
    keys: str
    """The entry of its keys."""
    fates: "np.ndarray"
    """Of its rows."""
    copies: "np.ndarray | None"
    """How often each of them is trained on; None: once."""
    entry: str
    """The entry to make."""

    def done_by(self, preparer: Preparer) -> None:
        """Make the entry."""
        with self.store.make(self.entry) as folder:
            keys = load_keys(self.store.folder(self.keys)).keys
            preparer.prepare(self.path, self.shard, keys, self.fates.copy(), folder, self.copies)


class Workers:
    """Does the work on shards; a context, which ends its processes."""

    def __init__(self, params: PreprocessParams, base: "Base", path: Path, store: Cache, purpose: str) -> None:
        """`purpose` is what the entries are made for, besides the rows: see `Cache.keep`."""
        self._params, self._base, self._path, self._store = params, base, path.absolute(), store
        self.tokenizer: Any = None
        self.kept = ""
        """The cache's name of the tokenizer."""
        self.made = 0
        self._pool: ProcessPoolExecutor | ClusterPool | None = None
        self._ahead = Ahead(store, purpose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.end()
        self._end()

    def load_tokenizer(self) -> None:
        """Load the base's tokenizer, once."""
        if self.tokenizer is None:
            self.tokenizer, self.kept = open_tokenizer(self._base, self._store)

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

        def task(i: int) -> _Task:
            own = slice(shards[i].first, shards[i].end)
            often = None if copies is None else copies[own]
            return _Task(self._path, shards[i], self._store, keys[i], fates[own], often, entries[i])

        new = [i for i, entry in enumerate(entries) if not self._store.folder(entry).is_dir()]
        if self._is_little(shards, new):  # what is new is made while the bytes of what is kept are verified
            with ThreadPoolExecutor(cores()) as threads:
                kept = threads.submit(self._missing, shards, entries, skip=frozenset(new))
                self._prepare_here([task(i) for i in new])
                missing = kept.result()
            self.made = len(new)
        else:
            missing = self._missing(shards, entries)
            self.made = 0
        self.made += len(missing)
        tasks = [task(i) for i in sorted(missing, key=lambda i: -shards[i].rows)]  # all cores end together
        if self._is_little(shards, missing):
            self._prepare_here(tasks)
            return
        self.load_tokenizer()
        pool = self._start()
        self._gather([pool.submit(_prepare_there, each) for each in tasks], "made")

    def _prepare_here(self, tasks: Sequence[_Task]) -> None:
        if tasks:
            self.load_tokenizer()
            preparer = Preparer(open_chat(self.tokenizer), self.tokenizer, self._params)
            for each in tasks:
                each.done_by(preparer)

    def _is_little(self, shards: Sequence[Shard], some: Sequence[int]) -> bool:
        """Say whether this process alone makes these shards as fast as several."""
        return len(some) < 2 or sum(shards[i].rows for i in some) <= _LITTLE

    def _missing(
        self, shards: Sequence[Shard], entries: Sequence[str], skip: frozenset[int] = frozenset()
    ) -> list[int]:
        """Return which entries are not there whole, of those not to be skipped; hashing leaves the interpreter's lock."""
        some = [i for i, shard in enumerate(shards) if shard.rows and i not in skip]
        with ThreadPoolExecutor(cores()) as threads:
            found = list(threads.map(self._ahead.find, [entries[i] for i in some]))
        return [i for i, folder in zip(some, found, strict=True) if folder is None]

    def _start(self) -> "ProcessPoolExecutor | ClusterPool":
        if address := os.environ.get(ADDRESS, ""):
            self._pool = cluster_pool(address, self._params, self._base)
            return self._pool
        self._ahead.end()
        if FORKED:
            _inherited["tokenizer"] = self.tokenizer
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer looks for it when its process is forked
        self._pool = ProcessPoolExecutor(
            cores(), mp_context=context(), initializer=_begin, initargs=(self._params, self._base, os.getpid())
        )
        return self._pool

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        _inherited.clear()

    def _gather(self, futures: "Sequence[Future[None] | ClusterFuture[None]]", what: str) -> None:
        with explained("prepared rows"):
            for done, future in enumerate(futures, 1):
                future.result()
                log.debug("preprocess: %d of %d shards %s", done, len(futures), what)


def _begin(params: PreprocessParams, base: "Base", parent: int) -> None:
    follow(parent)
    become_worker(params, base, _inherited.get("tokenizer"))


def become_worker(params: PreprocessParams, base: "Base", tokenizer: Any = None) -> None:
    """Let this process, of a pool or of a cluster, be one that prepares shards with these parameters."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process
    collect_seldom()
    _inherited.clear()
    _inherited.update(params=params, base=base, tokenizer=tokenizer)


def _look(path: Path, shard: Shard, params: PreprocessParams, store: Cache, entry: str) -> None:
    with store.make(entry) as folder:
        read_keys(path, shard, params, folder)


def _prepare_there(task: _Task) -> None:
    """Prepare a shard in a process of the pool."""
    if "preparer" not in _inherited:
        if _inherited.get("tokenizer") is None:
            from regraft.model import load

            _inherited["tokenizer"] = load.load_tokenizer(_inherited["base"])
        tokenizer = _inherited["tokenizer"]
        _inherited["preparer"] = Preparer(open_chat(tokenizer), tokenizer, _inherited["params"])
    task.done_by(_inherited["preparer"])
