"""Verifying what the last run used while this one imports, cuts and looks, which leaves all cores but one idle.

An increment uses nearly all of that again, and hashing it takes a third of an increment's time.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from regraft.preprocess.shards import Cache


class Ahead:
    """A thread that verifies a cache's entries in the order in which they will be asked for."""

    def __init__(self, store: Cache, purpose: str) -> None:
        """Begin with the entries that `Cache.keep` noted last for the same purpose; with none there is no thread."""
        self._store = store
        self._begun: dict[str, Future[Path | None]] = {}
        self._threads: ThreadPoolExecutor | None = None
        if noted := store.noted(purpose):
            self._threads = ThreadPoolExecutor(1)
            self._begun = {name: self._threads.submit(store.find, name) for name in noted}

    def find(self, digest: str) -> Path | None:
        """Return what `Cache.find` returns; an entry that was not begun with is verified by the caller's own thread."""
        future = self._begun.pop(digest, None)
        if future is None or future.cancel():
            return self._store.find(digest)
        return future.result()

    def end(self) -> None:
        """End the thread; a process forks without others. What it verified until then is not verified again."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._begun = {name: future for name, future in self._begun.items() if not future.cancelled()}
