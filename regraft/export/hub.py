"""Publishing to the Hugging Face hub, or to a server that speaks its protocol: private, checked, `main` last.

    branch export-<name>    one export, in one commit; `revision="export-<name>"` stays what it is
    branch main             the export to serve, moved in one commit once the other branch was checked

A commit is atomic on the hub: a reader of `main` gets the old export or the new one. What the hub holds is compared with
the export by what it reports for each file (sha256 of large files, git's sha1 of small ones), without reading gigabytes
back. The interface is that of `huggingface_hub` (https://huggingface.co/docs/huggingface_hub/guides/upload).
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from regraft.artifacts import MANIFEST, digest_file, read_json
from regraft.errors import DamagedArtifact, ParamsError, ServiceUnavailable
from regraft.export.certificate import README
from regraft.failpoints import failpoint

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("regraft")
SCHEME = "hf://"
MAIN = "main"
_BRANCH = "export-"
_OWN = (".gitattributes",)  # the hub's own
_REFUSED = (401, 403)
_OVERTAKEN = (409, 412)


def send_to_hub(
    folder: Path, url: str, name: str, *, keep: int, latest: bool, private: bool
) -> tuple[int, bool, list[str]]:
    """Send a verified export to `hf://OWNER/REPOSITORY`; the repository is made if there is none.

    Args:
        folder: an export or a merge whose bytes were checked.
        url: where to; the server is `HF_ENDPOINT`, the token is `HF_TOKEN` or that of `hf auth login`.
        name: of the export, from its manifest's digest.
        keep: exports whose branches stay, the new one included; history keeps all.
        latest: move `main`.
        private: of a repository that is made now; one that is there keeps what it is.

    Returns:
        Files that were sent, whether `main` moved, and the names of exports whose branches were removed.

    Raises:
        ParamsError: the URL names no repository, or the token may not write there.
        DamagedArtifact: the hub holds other bytes than were sent.
        ServiceUnavailable: the hub does not answer; the same command goes on.
    """
    repo = url.removeprefix(SCHEME).strip("/")
    if repo.count("/") != 1:
        raise ParamsError(f"{url} names no repository", fix=f"write {SCHEME}OWNER/REPOSITORY")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _explained(url):
        api.create_repo(repo, private=private, exist_ok=True)
        _check_repository(api, repo, url, private=private)
        branch = _BRANCH + name
        branches = {each.name for each in api.list_repo_refs(repo).branches}
        if branch not in branches:
            api.create_branch(repo, branch=branch)
        sent = _commit(api, repo, branch, folder, name)
        _check(api, repo, branch, folder, url)
        failpoint("publish.manifest")
        if not latest:
            return sent, False, []
        moved = bool(_commit(api, repo, MAIN, folder, name))
        _check(api, repo, MAIN, folder, url)
        failpoint("publish.latest")
        order = list(dict.fromkeys(_published(api, repo)))
        old = [each for each in order if each != name][keep - 1 :]
        removed = [each for each in old if _BRANCH + each in branches]
        for each in removed:
            api.delete_branch(repo, branch=_BRANCH + each)
        return sent, moved, removed


def _check_repository(api: "HfApi", repo: str, url: str, *, private: bool) -> None:
    """Refuse a repository that others can read, and one that holds what no export put there: publishing replaces it all.

    Raises:
        ParamsError: it is one of these.
    """
    if private and not api.repo_info(repo).private:
        raise ParamsError(f"{url} is public, and the export was to be private", fix="add --public, or name another one")
    if not list(_published(api, repo)):
        foreign = sorted(_held(api, repo, MAIN).keys() - {*_OWN, README})
        if foreign:
            raise ParamsError(
                f"{url} holds {len(foreign)} files that no export of Regraft put there, first {foreign[0]}",
                fix="name a repository of the export's own, or empty that one",
            )


def _published(api: "HfApi", repo: str) -> Iterator[str]:
    """The names of the exports that `main` has held, newest first."""
    for commit in api.list_repo_commits(repo, revision=MAIN):
        if commit.title.startswith(_title("")):
            yield commit.title.rpartition(" ")[2]


def _title(name: str) -> str:
    return f"Regraft export {name}"


def _files(folder: Path) -> list[str]:
    return [*sorted(read_json(folder / MANIFEST)["files"]), MANIFEST]


def _commit(api: "HfApi", repo: str, branch: str, folder: Path, name: str) -> int:
    """Make a branch hold the folder's files and no others, in one commit; return how many were sent."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo, revision=branch).sha
    there = _held(api, repo, head or branch)
    changed = [file for file in _files(folder) if not _equal(folder / file, there.get(file))]
    foreign = sorted(there.keys() - set(_files(folder)) - set(_OWN))
    if changed or foreign:
        operations: list[Any] = [CommitOperationAdd(file, str(folder / file)) for file in changed]
        operations += [CommitOperationDelete(file) for file in foreign]
        api.create_commit(repo, operations, commit_message=_title(name), revision=branch, parent_commit=head)
        failpoint("publish.file")
    return len(changed)


def _held(api: "HfApi", repo: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _equal(path: Path, held: Any) -> bool:
    """Compare a file with what the hub says of its own: sha256 of an LFS file, git's blob id of a small one."""
    if held is None or held.size != path.stat().st_size:
        return False
    if held.lfs is not None:
        return bool(held.lfs.sha256 == digest_file(path))
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)  # as git names it
    return bool(held.blob_id == blob.hexdigest())


def _check(api: "HfApi", repo: str, branch: str, folder: Path, url: str) -> None:
    there = _held(api, repo, branch)
    wrong = [file for file in _files(folder) if not _equal(folder / file, there.get(file))]
    wrong += sorted(there.keys() - set(_files(folder)) - set(_OWN))
    if wrong:
        raise DamagedArtifact(
            f"{url}, branch {branch}: {len(wrong)} files are not as they were sent, first {wrong[0]}",
            fix="run the same command again",
        )


@contextmanager
def _explained(url: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The HTTP client's errors and OSError; an upload that fails is a RuntimeError.
    errors = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, ValueError, RuntimeError))
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ServiceUnavailable(f"{url}: HF_HUB_OFFLINE is set", fix="unset it, and publish again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in _REFUSED:
            raise ParamsError(
                f"{url}: the hub refuses the token ({status}), or there is none",
                fix="hf auth login, with a token that may write there",
            ) from error
        if status in _OVERTAKEN:
            raise ServiceUnavailable(
                f"{url}: somebody else committed there in the same moment", fix="run the same command again"
            ) from error
        raise ServiceUnavailable(
            f"{url}: the hub answers {status}: {str(error)[:300]}", fix="run the same command again"
        ) from error
    except errors as error:
        if isinstance(error, DamagedArtifact | ParamsError | ServiceUnavailable):
            raise
        raise ServiceUnavailable(
            f"{url} cannot be written: {type(error).__name__}: {str(error.__cause__ or error)[:300]}",
            fix="run the same command again",
        ) from error
