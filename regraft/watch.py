"""Whether the data changed: a fingerprint of the raw files, and what was last said about it.

The fingerprint is a digest of names, sizes and sha256 of every file that `data.raw` names. Digests of unchanged files
(same size, times and inode) come from a cache, so that a poll of large data costs one `stat` a file.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import digest_file, digest_json, hold, read_json, write_json
from regraft.errors import RegraftError
from regraft.layout import Layout

EVENT = "regraft.data.changed"
"""The event that a change of the raw data becomes; its payload is `{"fingerprint": ...}`."""


@dataclass(frozen=True)
class Fingerprint:
    """What the raw data is at one moment; `youngest` is the age in seconds of the file changed last (None: no file)."""

    digest: str
    files: int
    bytes: int
    youngest: float | None


@dataclass(frozen=True)
class Poll:
    """What one look found; `emitted` says whether an event was sent for it, `why` says why or why not."""

    fingerprint: str
    emitted: bool
    why: str


def raw_files(root: Path, raw: list[str]) -> list[Path]:
    """List the files that `data.raw` names (files, folders, globs), sorted; hidden and half-written ones are left out.

    Args:
        root: the clone that relative entries start from.
        raw: the entries of `data.raw`.
    """
    found: set[Path] = set()
    for entry in raw:
        path = root / entry
        matches = [path] if path.exists() else sorted(root.glob(entry)) if not Path(entry).is_absolute() else []
        for match in matches:
            found.update(p for p in (match.rglob("*") if match.is_dir() else [match]) if p.is_file())
    return sorted(p for p in found if not p.name.startswith(".") and p.suffix not in {".tmp", ".part", ".crdownload"})


def fingerprint(layout: Layout, raw: list[str]) -> Fingerprint:
    """Digest the raw files; the cache of file digests lies under `data/work/watch/`.

    Raises:
        RegraftError: a file went away or changed while it was read; look again later.
    """
    cache_file = layout.work / "watch/files.json"
    cache: dict[str, list[Any]] = _read(cache_file)
    entries: dict[str, list[Any]] = {}
    total, youngest = 0, None
    for path in raw_files(layout.root, raw):
        name = path.relative_to(layout.root).as_posix() if path.is_relative_to(layout.root) else path.as_posix()
        try:
            entries[name] = _entry(path, cache.get(name))
        except OSError as error:
            raise RegraftError(f"{name} changed while it was read: {error}", fix="look again later") from error
        size, _, changed = entries[name][:3]
        total += size
        age = time.time() - changed / 1e9  # the kernel's own time of change: a copy can bring an old mtime along
        youngest = age if youngest is None else min(age, youngest)
    if entries != cache:
        write_json(cache_file, entries)
    digest = digest_json([[name, entry[0], entry[-1]] for name, entry in entries.items()])
    return Fingerprint(digest, len(entries), total, youngest)


def poll(
    layout: Layout, raw: list[str], *, settle: float, trained: str | None, emit: Callable[[str, str], None]
) -> Poll:
    """Look once, and send one event where the data is new.

    A fingerprint is remembered under `data/work/watch/` before its event is sent and marked as sent afterwards; after
    a kill between the two, the next look sends the same event again, with the same id.

    Args:
        layout: the clone.
        raw: the entries of `data.raw`.
        settle: seconds that every file must have been unchanged.
        trained: the fingerprint that the last retraining ended with; for that one no event is needed.
        emit: sends the event for (fingerprint, event id); raises if it was not accepted.

    Raises:
        Busy: another watcher looks at this moment.
    """
    memory_file = layout.work / "watch/memory.json"
    with hold(layout.lock("watch"), "the watch of the raw data"):
        memory = _read(memory_file)
        now = fingerprint(layout, raw)
        if now.youngest is None:
            return Poll(now.digest, False, f"no file yet in {', '.join(raw)}")
        if memory.get("fingerprint") == now.digest and memory.get("sent"):
            return Poll(now.digest, False, "the data is as it was")
        if now.digest == trained:
            write_json(memory_file, {"fingerprint": now.digest, "sent": True})
            return Poll(now.digest, False, "the last retraining ended with this data")
        if now.youngest < settle:
            return Poll(now.digest, False, f"a file changed {now.youngest:.0f} s ago; waiting until it has settled")
        previous = memory.get("fingerprint") if memory.get("sent") else memory.get("previous")
        event = digest_json(["regraft.data.changed", previous, now.digest])[:32]
        write_json(memory_file, {"fingerprint": now.digest, "previous": previous, "sent": False})
        emit(now.digest, event)
        write_json(memory_file, {"fingerprint": now.digest, "sent": True})
        return Poll(now.digest, True, f"the data changed: {now.files} files, {now.bytes / 1e6:.1f} MB")


def _entry(path: Path, known: list[Any] | None) -> list[Any]:
    """Return [size, mtime and ctime in ns, inode, sha256] of a file; the digest is read from `known` where the rest is equal."""
    for _ in range(3):
        before = _identity(path)
        if known is not None and known[:-1] == before:
            return known
        digest = digest_file(path)
        if _identity(path) == before:
            return [*before, digest]
    raise OSError("it is being written")


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(path: Path) -> dict[str, Any]:
    """Read our own memory; a damaged or missing one is an empty one (the cost is a digest, or an event too many)."""
    try:
        content = read_json(path)
    except RegraftError:
        return {}
    return content if isinstance(content, dict) else {}
