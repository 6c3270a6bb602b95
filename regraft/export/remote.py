"""Publishing to where servers read: any store that fsspec reaches (a folder, S3, GCS, ...), the pointer last.

The Hugging Face hub (`hf://`) is in `hub.py`, a DVC remote (`dvc://`) in `dvc_remote.py`. Everywhere else:

    URL/<name>/...          one export, whole once its manifest.json is there (it is sent last)
    URL/latest.json         names the export to serve, its manifest's digest, and what was served before

Readers take `latest.json`, check the manifest against the digest in it, and the files against the manifest: they see the
old export or the new one, never a mixture. A store's single PUT is atomic; a folder gets a rename.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.artifacts import MANIFEST, dir_digest, pretty_json, read_json, write_file
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, RegraftError, ServiceUnavailable
from regraft.export.dvc_remote import DVC_SCHEME, send_to_dvc
from regraft.export.hub import SCHEME, send_to_hub
from regraft.export.whole import verify_folder
from regraft.failpoints import failpoint

log = logging.getLogger("regraft")
LATEST = "latest.json"
_BLOCK = 8 * 2**20  # bytes
_STORES = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "azure", "adlfs", "aiohttp", "paramiko"}
"""Packages of fsspec's stores; some of their errors are no OSError."""


Name = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""An export's folder in a store; whoever can write `latest.json` must not lead a publication anywhere else."""


class Pointer(BaseModel):
    """`latest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    manifest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """sha256 of the export's manifest.json."""
    before: list[Name] = []
    """Names of what was latest before, newest first; those that are still there."""
    leaving: list[Name] = []
    """Names of what was to be removed once this was written; a publication removes what one before it left of them."""


class Published(BaseModel):
    """What a publication did."""

    model_config = ConfigDict(frozen=True)

    url: str
    name: str
    sent: int
    """Files that were sent; those that were there with the same bytes are not."""
    moved: bool
    """`latest.json` was changed."""
    removed: list[str]


def publish_to(
    folder: Path,
    url: str,
    *,
    keep: int = 3,
    latest: bool = True,
    private: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Published:
    """Send a verified export or merge to a store, check every byte there, then move the pointer.

    Args:
        folder: an export or a merge.
        url: such as `s3://bucket/models/support`, a folder, `hf://owner/repository`, or `dvc://remote/path`.
        keep: exports to keep there, the new one included.
        latest: move the pointer.
        private: of a repository of the hub that is made now.
        options: for fsspec; credentials come from the environment.

    Raises:
        DamagedArtifact: the folder is no verified export, or the store does not return what was sent.
        ParamsError: the URL's protocol is not known here.
        ServiceUnavailable: the store does not answer; the same command goes on.
    """
    verify_folder(folder)
    manifest = dir_digest(folder)
    name = manifest[:16]
    if url.startswith(SCHEME):
        sent, moved, removed = send_to_hub(folder, url, name, keep=keep, latest=latest, private=private)
        return Published(url=url, name=name, sent=sent, moved=moved, removed=removed)
    if url.startswith(DVC_SCHEME):
        sent = send_to_dvc(folder, url)
        return Published(url=url, name=name, sent=sent, moved=bool(sent), removed=[])
    store = _Store(url, options or {})
    sent = 0
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for file, entry in sorted(listed.items()):
            if store.digest(f"{name}/{file}") != entry["sha256"]:
                store.send(folder / file, f"{name}/{file}", entry["sha256"])
                sent += 1
            failpoint("publish.file")
        foreign = sorted(set(store.files(name)) - {*listed, MANIFEST})
        for file in foreign:
            store.remove(f"{name}/{file}")
        if store.digest(f"{name}/{MANIFEST}") != manifest:
            store.send(folder / MANIFEST, f"{name}/{MANIFEST}", manifest)
            sent += 1
        failpoint("publish.manifest")
        before = store.pointer()
        if not latest:
            if (
                before is not None and name in before.leaving
            ):  # it is wanted again: no later publication is to remove it
                stay = before.model_copy(update={"leaving": [each for each in before.leaving if each != name]})
                store.write(LATEST, pretty_json(stay.model_dump()))
            return Published(url=url, name=name, sent=sent, moved=False, removed=[])
        history = [each for each in ([before.name, *before.before] if before else []) if each != name]
        left = [each for each in before.leaving if each not in (name, *history) and store.has(each)] if before else []
        pointer = Pointer(
            name=name, manifest=manifest, before=history[: keep - 1], leaving=[*history[keep - 1 :], *left]
        )
        moved = before is None or pointer.model_copy(update={"leaving": before.leaving}) != before
        if moved:
            store.write(LATEST, pretty_json(pointer.model_dump()))
        failpoint("publish.latest")
        now = store.pointer()  # another publisher may have gone back to an old one
        removed = [old for old in pointer.leaving if now is None or old not in (now.name, *now.before)]
        for old in removed:
            store.remove_export(old)
        return Published(url=url, name=name, sent=sent, moved=moved, removed=removed)
    except RegraftError:
        raise
    except Exception as error:  # each store has errors of its own
        if not isinstance(error, OSError | TimeoutError) and type(error).__module__.split(".")[0] not in _STORES:
            raise
        keys = "Credentials" in type(error).__name__
        raise ServiceUnavailable(
            f"{url} cannot be written: {type(error).__name__}: {str(error)[:300]}",
            fix="give the store's keys in the environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            if keys
            else "run the same command again; what was sent is not sent twice",
        ) from error


def latest_at(url: str, options: Mapping[str, Any] | None = None) -> Pointer:
    """Return what a store's pointer names, after its manifest was checked.

    Raises:
        MissingInput: nothing was published there.
        DamagedArtifact: the pointer or its manifest is not what it should be.
    """
    store = _Store(url, options or {})
    pointer = store.pointer()
    if pointer is None:
        raise MissingInput(f"{url} has no {LATEST}: nothing was published there", fix="regraft publish FOLDER URL")
    if store.digest(f"{pointer.name}/{MANIFEST}") != pointer.manifest:
        raise DamagedArtifact(f"{url}/{pointer.name} is not the export that {LATEST} names")
    return pointer


class _Store:
    """The few operations on a store that a publication needs."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise ParamsError(f"{url}: {error}", fix="name a folder, or install what its protocol needs") from error
        self._root = str(root).rstrip("/")
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        self._fs.invalidate_cache()

    def digest(self, name: str) -> str | None:
        """Sha256 of what the store returns for a name, None where there is nothing."""
        found = hashlib.sha256()
        try:
            with self._fs.open(self._path(name), "rb") as stream:
                while block := stream.read(_BLOCK):
                    found.update(block)
        except FileNotFoundError:
            return None
        return found.hexdigest()

    def send(self, source: Path, name: str, digest: str) -> None:
        """Send a file and read it back.

        Raises:
            DamagedArtifact: the store returns other bytes.
        """
        path = self._path(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(source), path)
        if (found := self.digest(name)) != digest:
            raise DamagedArtifact(f"{path} has the sha256 {found} after it was sent, expected {digest}")

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file in one step."""
        if self._local:
            write_file(Path(self._path(name)), data)
        else:
            self._fs.pipe_file(self._path(name), data)

    def files(self, name: str) -> Iterator[str]:
        folder = self._path(name)
        for path in self._fs.find(folder) if self._fs.exists(folder) else []:
            yield str(path).partition(f"{folder.lstrip('/')}/")[2]

    def has(self, name: str) -> bool:
        """Say whether there is anything of an export."""
        return next(self.files(name), None) is not None

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    def remove_export(self, name: str) -> None:
        """Remove an export, its manifest first: what is half removed is not whole."""
        names = sorted(self.files(name), key=lambda each: each != MANIFEST)
        for each in names:
            self.remove(f"{name}/{each}")
        if self._local and names:
            self._fs.rm(self._path(name), recursive=True)

    def pointer(self) -> Pointer | None:
        try:
            return Pointer.model_validate(json.loads(self._fs.cat_file(self._path(LATEST))))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError) as error:
            raise DamagedArtifact(
                f"{self._path(LATEST)} is not a pointer: {error}",
                fix="nothing was removed or pointed at; put the right one there, or remove it and publish again",
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
