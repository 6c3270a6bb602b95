"""Putting a verified merge where people read it: whole or not at all, the pointer `latest` last."""

import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from regraft.artifacts import MANIFEST, commit_dir, digest_file, read_json
from regraft.errors import DamagedArtifact, RegraftError
from regraft.export.certificate import CERTIFICATE, SUMS, sums
from regraft.export.report import Certificate, FileEntry
from regraft.export.signature import sign, signing_key
from regraft.failpoints import failpoint

LATEST = "latest"
_EXPORT = re.compile(r"[0-9a-f]{16}\Z")
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.[0-9a-f]{12}\.tmp\Z")


def publish(
    candidate: Path,
    extras: dict[str, bytes],
    certificate: Certificate,
    destination: Path,
    forms: Mapping[str, Path] | None = None,
) -> Certificate:
    """Put a candidate's files, `extras`, the certificate and the sums in place of `destination`.

    Args:
        candidate: a committed folder on the same disk; its files are linked, not copied, where the disk can.
        extras: more files by name, such as the model card.
        certificate: everything but `files`, which is filled in here.
        destination: `data/exports/<identity16>`.
        forms: more committed folders, each to lie in a folder of this name.

    Returns:
        The certificate as it was published.

    Raises:
        DamagedArtifact: a file is no longer what was verified.
    """
    sources, verified = {}, {}
    for prefix, place in {"": candidate, **(forms or {})}.items():
        for name, entry in read_json(place / MANIFEST)["files"].items():
            inside = f"{prefix}/{name}" if prefix else name
            sources[inside], verified[inside] = place / name, FileEntry(**entry)
    with commit_dir(destination) as folder:
        for name, source in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(source, folder / name)
        for name, data in extras.items():
            (folder / name).write_bytes(data)
        files = {
            path.relative_to(folder).as_posix(): _entry(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        changed = sorted(name for name, entry in verified.items() if files[name] != entry)
        if changed:
            raise DamagedArtifact(
                f"{candidate} changed after it was verified: {', '.join(changed)}", fix="regraft export"
            )
        certificate = certificate.model_copy(update={"files": files})
        certificate.save(folder / CERTIFICATE)
        (folder / SUMS).write_bytes(sums({**files, CERTIFICATE: _entry(folder / CERTIFICATE)}))
        sign(folder, signing_key())
        failpoint("export.publish")
    return certificate


def point_latest(exports: Path, name: str) -> None:
    """Let `exports/latest` name the folder `name`, by a relative symbolic link that is replaced in one step.

    Raises:
        RegraftError: something else than a link is in its place.
    """
    pointer = exports / LATEST
    for leftover in exports.glob(f".{LATEST}.*.tmp"):
        leftover.unlink(missing_ok=True)
    if pointer.is_symlink() and os.readlink(pointer) == name:  # noqa: PTH115 - the text of the link, not its target
        return
    if pointer.exists() and not pointer.is_symlink():
        raise RegraftError(
            f"{pointer} is not a symbolic link", fix=f"move it away: it is to name the newest export ({name})"
        )
    temporary = exports / f".{LATEST}.{secrets.token_hex(6)}.tmp"
    temporary.symlink_to(name)
    failpoint("export.latest")
    temporary.replace(pointer)
    descriptor = os.open(exports, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(exports: Path, keep: int, needed: Collection[str] = ()) -> list[str]:
    """Remove the oldest exports beyond `keep`, never the one that `latest` names; return the names removed.

    Exports whose names are `needed` are never removed either; like the one that `latest` names they count as kept.
    Also removes what killed exports left; so call it only while no other export writes here.
    """
    kept = set(needed)
    if (exports / LATEST).is_symlink():
        kept.add(os.readlink(exports / LATEST))  # noqa: PTH115
    folders = [
        path for path in exports.iterdir() if path.is_dir() and not path.is_symlink() and _EXPORT.match(path.name)
    ]
    newest_first = sorted(folders, key=lambda path: (path.name in kept, path.stat().st_mtime_ns), reverse=True)
    removed = []
    for path in newest_first[keep:]:
        if path.name in kept:
            continue
        aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")  # out of sight in one step
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        removed.append(path.name)
    for path in exports.iterdir():
        if _LEFTOVER.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return removed


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=digest_file(path), size=path.stat().st_size)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
