"""Publishing to a DVC remote: the bytes go there, a `.dvc` file here names them, and git says which one is the latest.

    regraft publish EXPORT dvc://REMOTE/models/support     # run in the clone; writes models/support.dvc
    git add models/support.dvc models/.gitignore && git commit
    dvc get REPOSITORY models/support                      # anywhere else: exactly that export

DVC stores by content and writes the `.dvc` file last, so a reader of a commit never sees a mixture; earlier exports stay
until `dvc gc` (https://dvc.org/doc/command-reference/add#--to-remote).
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

from regraft.artifacts import MANIFEST, digest_file, read_json
from regraft.errors import DamagedArtifact, ParamsError, ServiceUnavailable
from regraft.failpoints import failpoint

log = logging.getLogger("regraft")
DVC_SCHEME = "dvc://"
_BLOCK = 8 * 2**20  # bytes


def send_to_dvc(folder: Path, url: str, root: Path | None = None) -> int:
    """Send a verified export to a remote that the project's DVC knows, and read every byte of it back.

    Args:
        folder: an export or a merge whose bytes were checked.
        url: `dvc://REMOTE/PATH`; PATH is where the export would be in the clone.
        root: the clone; None for the present folder.

    Returns:
        Files that were sent; 0 where the `.dvc` file named these bytes already.

    Raises:
        ParamsError: the URL, the remote or the clone is not one.
        DamagedArtifact: the remote returns other bytes than were sent.
        ServiceUnavailable: the remote cannot be written; the same command goes on.
    """
    root = root or Path.cwd()
    remote, _, path = url.removeprefix(DVC_SCHEME).partition("/")
    if not remote or not path or ".." in PurePosixPath(path).parts:
        raise ParamsError(f"{url} names no remote and path", fix=f"write {DVC_SCHEME}REMOTE/PATH/IN/THE/CLONE")
    _check_remote(root, remote)
    if (root / path).exists():
        raise ParamsError(f"{path} is there, and a published export must not replace it", fix="name another path")
    pointer = root / f"{path}.dvc"
    before = pointer.read_bytes() if pointer.is_file() else None
    pointer.parent.mkdir(parents=True, exist_ok=True)
    command = ["add", "--quiet", "--force", "--to-remote", "--remote", remote, "--out", path, str(folder.resolve())]
    done = _dvc(command, root)
    if done.returncode:
        raise ServiceUnavailable(
            f"DVC cannot send {folder} to {remote}: {_last(done.stderr)}", fix="run the same command again"
        )
    failpoint("publish.manifest")
    try:
        _check(root, remote, path, folder)
    except BaseException:
        _put_back(pointer, before)
        raise
    listed = len(read_json(folder / MANIFEST)["files"]) + 1
    return 0 if pointer.read_bytes() == before else listed


def _check_remote(root: Path, remote: str) -> None:
    if not (root / ".dvc").is_dir():
        raise ParamsError(f"{root} is no clone of a DVC project", fix="run it in the clone's root")
    done = _dvc(["remote", "list"], root)
    if done.returncode:
        raise ParamsError(f"DVC cannot list its remotes: {_last(done.stderr)}", fix="mend .dvc/config")
    names = [line.split()[0] for line in done.stdout.splitlines() if line.split()]
    if remote not in names:
        raise ParamsError(
            f"DVC knows no remote {remote}, but {', '.join(names) or 'none'}", fix=f"dvc remote add {remote} URL"
        )


def _check(root: Path, remote: str, path: str, folder: Path) -> None:
    """Compare every file with what the remote returns; DVC's cache, which it would ask first, is left out."""
    import dvc.api
    from dvc.exceptions import DvcException

    entries = {name: entry["sha256"] for name, entry in read_json(folder / MANIFEST)["files"].items()}
    with tempfile.TemporaryDirectory() as empty:
        for name, expected in {**entries, MANIFEST: digest_file(folder / MANIFEST)}.items():
            found = hashlib.sha256()
            settings = {"cache": {"dir": empty}}
            try:
                with dvc.api.open(
                    f"{path}/{name}", repo=str(root), remote=remote, mode="rb", config=settings
                ) as stream:
                    while block := stream.read(_BLOCK):
                        found.update(block)
            except (DvcException, OSError) as error:
                raise DamagedArtifact(
                    f"remote {remote} does not return {path}/{name}: {str(error)[:200]}",
                    fix="mend the remote, and publish again",
                ) from error
            if found.hexdigest() != expected:
                raise DamagedArtifact(
                    f"remote {remote}: {path}/{name} has the sha256 {found.hexdigest()}, expected {expected}",
                    fix="mend the remote, and publish again",
                )


def _put_back(pointer: Path, before: bytes | None) -> None:
    if before is None:
        pointer.unlink(missing_ok=True)
    else:
        pointer.write_bytes(before)


def _dvc(arguments: list[str], root: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("ERROR")]
    return (lines or text.strip().splitlines() or ["it says nothing"])[-1][:300]
