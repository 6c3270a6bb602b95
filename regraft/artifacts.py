"""The one way in which Regraft writes: whole or not at all, with a manifest of digests.

    with commit_dir(out) as folder:       # a temporary sibling of `out`
        (folder / "rows.parquet").write_bytes(...)
    digest = verify_dir(out)              # raises DamagedArtifact if a byte differs

A folder is fsynced, its manifest is written last and it is put in place by one atomic rename, so the manifest's
presence means that the folder is whole. Covered: kill -9 and power loss at any point, two writers at once, a reader
during a write. Not covered: a file system without atomic rename (some network mounts): see `_put_in_place`.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.errors import Busy, DamagedArtifact, MissingInput, RegraftError
from regraft.failpoints import failpoint

MANIFEST = "manifest.json"


def canonical_json(value: Any) -> bytes:
    """Encode as UTF-8 JSON with sorted keys and no spaces; equal values give equal bytes (NaN is refused)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_bytes(data: bytes) -> str:
    """Return the sha256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing one raises `MissingInput`, an unreadable one `DamagedArtifact`."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise DamagedArtifact(f"{path} is not JSON: {error}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; readers see the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            failpoint("write_file.fsync")
            os.fsync(file.fileno())
        failpoint("write_file.replace")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_dir(path.parent)
    failpoint("write_file.done")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically (keys in the order given, a final newline)."""
    write_file(path, pretty_json(value))


def pretty_json(value: Any) -> bytes:
    """Encode as indented UTF-8 JSON for people, deterministic for equal input; NaN is refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextmanager
def commit_dir(destination: Path, digests: Mapping[str, str] | None = None, *, durable: bool = True) -> Iterator[Path]:
    """Give an empty folder to write into, and put it in place of `destination` when the block ends without error.

    On an error, or a kill at any point, `destination` keeps what it had. Left-overs of killed writers are removed by
    the next writer. The folder's `manifest.json` names size and sha256 of every other file.

    Args:
        destination: the folder to make or to replace.
        digests: sha256 by name of files that were digested while they were written; the block may fill it. They are not
            read again, which for gigabytes of weights is a quarter of the time.
        durable: wait until the bytes are on disk. Without, a power failure may leave a folder in place that `verify_dir`
            refuses: for caches, which are verified before use and made again.

    Raises:
        RegraftError: the parent is not writable or the disk is full; the temporary folder is gone.
    """
    destination = destination.absolute()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        folder, lock = _temporary_sibling(destination)
    except OSError as error:
        raise _explained(error, destination) from error
    try:
        failpoint("commit_dir.begin")
        yield folder
        failpoint("commit_dir.written")
        seal_dir(folder, digests, durable=durable)
        failpoint("commit_dir.sealed")
        _put_in_place(folder, destination)
        failpoint("commit_dir.placed")
        if durable:
            _fsync_dir(destination.parent)
    except OSError as error:
        if isinstance(error, RegraftError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            raise
        raise _explained(error, destination) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # ours on an error, the replaced content after an exchange
        os.close(lock)
    failpoint("commit_dir.done")


def seal_dir(folder: Path, digests: Mapping[str, str] | None = None, *, durable: bool = True) -> str:
    """Fsync every file of a folder, write its manifest last, and return the folder's digest (see `commit_dir`)."""
    known = digests or {}
    files: dict[str, dict[str, Any]] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise DamagedArtifact(f"{path} is a symbolic link; an artefact holds plain files only")
        if path.is_dir():
            folders.append(path)
        elif path != folder / MANIFEST:
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                files[name] = {
                    "sha256": known.get(name) or hashlib.file_digest(file, "sha256").hexdigest(),
                    "size": os.fstat(file.fileno()).st_size,
                }
                if durable:
                    os.fsync(file.fileno())
    failpoint("commit_dir.manifest")
    manifest = folder / MANIFEST
    with manifest.open("wb") as file:
        file.write(pretty_json({"schema_version": 1, "files": files}))
        if durable:
            file.flush()
            os.fsync(file.fileno())
    for each in reversed(folders) if durable else ():
        _fsync_dir(each)
    return digest_file(manifest)


def dir_digest(folder: Path) -> str:
    """Return the digest of a committed folder: the sha256 of its manifest, without reading the files themselves.

    Raises:
        MissingInput: there is no manifest, so the folder is not whole.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise MissingInput(f"{folder} is missing or not whole: it has no {MANIFEST}")
    return digest_file(manifest)


def verify_dir(folder: Path) -> str:
    """Check every byte of a committed folder against its manifest and return the folder's digest.

    Raises:
        MissingInput: there is no manifest.
        DamagedArtifact: a file is missing, foreign, or its bytes differ; the message names all of them.
    """
    digest = dir_digest(folder)
    listed = _listed(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(listed))]
    for name, entry in sorted(listed.items()):
        path = folder / name
        if name not in present:
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {entry['size']}")
        elif digest_file(path) != entry["sha256"]:
            problems.append(f"{name}: its sha256 differs from the manifest's")
    if problems:
        raise DamagedArtifact(f"{folder} is damaged: " + "; ".join(problems))
    return digest


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a manifest lists; whoever sent the folder may have written it."""
    content = read_json(folder / MANIFEST)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise DamagedArtifact(f"{folder / MANIFEST} is no manifest: it has no `files`")
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise DamagedArtifact(f"{folder / MANIFEST} is no manifest: {name} has not a `size` and a `sha256`")
    return files


@contextmanager
def hold(lock: Path, what: str, note: dict[str, Any] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `lock` for the block; the kernel releases it however the process ends.

    Raises:
        Busy: another process holds it; the message names its process id.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = lock_holder(lock).get("pid", "unknown")
            raise Busy(
                f"{what} is busy: process {holder} holds {lock}",
                fix="wait for it to end, then run the same command again",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, canonical_json({"pid": os.getpid(), **(note or {})}), 0)
        yield
    finally:
        os.close(descriptor)


def lock_holder(lock: Path) -> dict[str, Any]:
    """Return what the last holder of a lock wrote about itself (empty if nothing readable)."""
    try:
        holder = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_held(lock: Path) -> bool:
    """Say whether some process holds `lock` at this moment."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _temporary_sibling(destination: Path) -> tuple[Path, int]:
    """Make a temporary folder whose writer is alive exactly as long as somebody holds its lock."""
    while True:
        folder = destination.with_name(f".{destination.name}.{secrets.token_hex(6)}.tmp")
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # swept away by another writer's clean-up
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # not swept away between mkdir and flock either
            return folder, lock
        os.close(lock)


def _remove_leftovers(destination: Path) -> None:
    for folder in destination.parent.glob(f".{destination.name}.*.tmp"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(lock)


def _put_in_place(folder: Path, destination: Path) -> None:
    """Move `folder` to `destination` in one step; an existing destination's content ends up at `folder`.

    Where the file system cannot exchange two names, the old folder is first moved aside: then a kill between the two
    renames leaves no destination (never a mixture), and the next run makes it again.
    """
    if not destination.exists():
        try:
            folder.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was first: exchange with it
                raise
        else:
            return
    if _exchange(folder, destination):
        return
    aside = folder.with_name(folder.name.replace(".tmp", ".old.tmp"))
    destination.rename(aside)
    folder.rename(destination)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False where the system or the file system cannot (renameat2, renamex_np)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        code = libc.renamex_np(os.fsencode(first), os.fsencode(second), ctypes.c_uint(2))
    elif hasattr(libc, "renameat2"):
        at_cwd = -100
        code = libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), ctypes.c_uint(2))
    else:
        return False
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _fsync_dir(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, destination: Path) -> RegraftError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        probe = next(p for p in (destination, *destination.parents) if p.exists())
        free = shutil.disk_usage(probe).free / 1e6
        return RegraftError(
            f"the disk that holds {destination} is full ({free:.1f} MB free); what was there is unchanged",
            fix="free some space, or move data/work to a larger disk, then run the same command again",
        )
    return RegraftError(
        f"{destination} cannot be written: {error.strerror or error}", fix="check the folder's owner and mode"
    )
