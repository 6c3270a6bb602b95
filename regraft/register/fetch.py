"""Getting a version's files, and checking every byte of them against the digests in its tags."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.artifacts import MANIFEST, commit_dir, digest_bytes, digest_file, read_json, verify_dir
from regraft.errors import DamagedArtifact, GateRefused, MissingInput, RegraftError
from regraft.gates.verdict import VERDICT, Verdict
from regraft.model.adapter import adapter_digest
from regraft.register.version import Version, local_folder

VERDICTS = "verdicts"
"""Folder of later verdicts, each named by its digest; beside the manifest, not in it."""


def fetch(version: Version, to: Path) -> Path:
    """Put a version's files into the folder `to`: adapter, reports, verdict, lineage, answers and manifest.

    Nothing is moved where `to` holds exactly them already.

    Raises:
        DamagedArtifact: the registry's files differ from the version's digests; `to` keeps what it had.
        MissingInput: the registry has lost them.
        ServiceUnavailable: a server does not answer.
    """
    try:
        if verify_dir(to) == version.manifest_digest:
            return to
    except RegraftError:
        pass  # nothing there, or something else: fetched below
    with files_of(version) as source, commit_dir(to) as folder:
        listed = read_json(source / MANIFEST)["files"]
        for name in listed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        for name, entry in listed.items():
            if digest_file(folder / name) != entry["sha256"]:
                raise DamagedArtifact(f"{source / name} changed while it was read")
    return to


@contextmanager
def files_of(version: Version) -> Iterator[Path]:
    """Give a folder with a version's files, verified; downloaded for the block unless they are on this disk."""
    if not version.complete:
        raise MissingInput(f"{version.label()} was not registered by Regraft: it has no manifest to check it against")
    local = local_folder(version.source)
    if local is not None:
        check(version, local)
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="regraft-") as temporary:
        folder = download(version, "", Path(temporary))
        check(version, folder)
        yield folder


def check(version: Version, folder: Path) -> None:
    """Check a version's files: the manifest against its tag, all files against the manifest, the adapter's digest.

    Raises:
        DamagedArtifact: with what differs.
        MissingInput: the folder or its manifest is gone.
    """
    if not (folder / MANIFEST).is_file():
        raise MissingInput(
            f"the files of {version.label()} are not at {folder}", fix="restore the artefact store from a backup"
        )
    check_bundle(folder, version.manifest_digest, version.label())
    if (found := adapter_digest(folder / "adapter")) != version.adapter_digest:
        raise DamagedArtifact(
            f"the adapter of {version.label()} has digest {found}, its tag says {version.adapter_digest}"
        )


def check_bundle(folder: Path, manifest: str, label: str) -> None:
    """Check a bundle of files against the digest of its manifest; later verdicts beside it do not count."""
    if (found := digest_file(folder / MANIFEST)) != manifest:
        raise DamagedArtifact(f"{label}: {folder / MANIFEST} has sha256 {found}, expected {manifest}")
    problems = []
    listed: dict[str, Any] = read_json(folder / MANIFEST)["files"]
    for name, entry in sorted(listed.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name}: a path that leads out of the folder")
        elif not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif digest_file(folder / name) != entry["sha256"]:
            problems.append(f"{name}: its sha256 differs from the manifest's")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(name for name in present - set(listed) - {MANIFEST} if not name.startswith(f"{VERDICTS}/"))
    problems += [f"{name}: not in the manifest" for name in foreign]
    if problems:
        raise DamagedArtifact(f"{label} is damaged at {folder}: " + "; ".join(problems))


def read_verdict(version: Version) -> Verdict:
    """Return the last verdict about a version.

    Raises:
        GateRefused: it is missing, unreadable, or not the one that the version's tag names.
    """
    wanted = version.verdict_digest
    for name in (VERDICT, f"{VERDICTS}/{wanted[:16]}.json"):
        try:
            data = read_file(version, name)
        except MissingInput:
            continue
        if digest_bytes(data) == wanted:
            try:
                return Verdict.model_validate_json(data)
            except ValueError as error:
                raise GateRefused(f"the verdict of {version.label()} is unreadable: {error}") from error
    raise GateRefused(
        f"{version.label()} has no verdict with the digest in its tag ({wanted or 'no tag'})",
        fix="judge it again: `regraft retrain`",
    )


def read_file(version: Version, name: str) -> bytes:
    """Return the bytes of one file of a version, as they are (the caller checks them).

    Raises:
        MissingInput: the version has no such file.
        ServiceUnavailable: a server does not answer.
    """
    local = local_folder(version.source)
    if local is not None:
        try:
            return (local / name).read_bytes()
        except FileNotFoundError as error:
            raise MissingInput(f"{version.label()} has no {name} at {local}") from error
    with tempfile.TemporaryDirectory(prefix="regraft-") as temporary:
        return download(version, name, Path(temporary)).read_bytes()


def download(version: Version, name: str, to: Path) -> Path:
    """Download a version's folder (`name` empty) or one file of it through MLflow."""
    from regraft.register.service import Service

    return Service(version.uri, again="the same command").download(version.source, name, to)
