"""The code that made a version, kept as a git commit under `refs/regraft/`, without touching the user's work.

The commit holds the working tree: tracked files as they are now and untracked ones that git does not ignore. It is
made with a temporary index, so HEAD, branches, the index and every file stay as they are. Equal content on the same
HEAD gives the same commit. `git push origin 'refs/regraft/*:refs/regraft/*'` shares them.
"""

import fnmatch
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from regraft.failpoints import failpoint

REFS = "refs/regraft/"
_LARGEST = 10_000_000  # bytes of an untracked file; larger ones are data, which has digests of its own
_SECRET = (".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", "*credentials*")
_FOREIGN = ("DIR", "WORK_TREE", "INDEX_FILE", "PREFIX", "OBJECT_DIRECTORY", "COMMON_DIR", "NAMESPACE")
_AUTHOR = "Regraft"  # fixed, with a fixed date: the commit's name depends on content only


def keep_code(root: Path) -> dict[str, Any]:
    """Keep the working tree that contains `root` as a commit and say which.

    Returns:
        commit: its name, null where there is no git; then `reason` says why.
        ref: the reference that keeps it from being collected.
        head: the commit that the user is on, null before the first.
        dirty: whether the tree differs from `head`'s.
        left_out: untracked files that were not kept (over 10 MB, or named like a secret).
    """
    try:
        top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    except FileNotFoundError:
        return {"commit": None, "reason": "git is not installed"}
    except subprocess.CalledProcessError:
        return {"commit": None, "reason": "the clone is not a git repository"}
    try:
        return _keep(top)
    except subprocess.TimeoutExpired:
        return {"commit": None, "reason": "git took too long"}
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return {"commit": None, "reason": f"git failed ({error.returncode}): {said[-1] if said else 'no message'}"}


def _keep(top: Path) -> dict[str, Any]:
    head = _head(top)
    with tempfile.TemporaryDirectory(prefix="regraft-") as temporary:
        index = Path(temporary) / "index"
        present = top / _git(top, "rev-parse", "--git-path", "index").strip()
        if present.is_file():
            shutil.copyfile(present, index)  # its cached file times spare git from reading every file again
        env = {"GIT_INDEX_FILE": str(index)}
        _git(top, "add", "--update", "--", ".", env=env)
        untracked = _git(top, "ls-files", "-z", "--others", "--exclude-standard", env=env).split("\0")
        kept: list[str] = []
        left_out: list[str] = []
        for name in filter(None, untracked):
            (kept if _fit(top / name) else left_out).append(name)
        _git(top, "update-index", "--add", "-z", "--stdin", env=env, stdin="".join(f"{name}\0" for name in kept))
        tree = _git(top, "write-tree", env=env).strip()
    date = _git(top, "show", "--no-patch", "--format=%cI", head).strip() if head else "2000-01-01T00:00:00+00:00"
    who = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER") for part, value in _identity(date).items()}
    parent = ["-p", head] if head else []
    commit = _git(top, "commit-tree", tree, *parent, "-m", "The code of a registered version", env=who).strip()
    failpoint("snapshot.ref")
    ref = f"{REFS}{commit[:16]}"
    _git(top, "update-ref", ref, commit)
    clean = head is not None and _git(top, "rev-parse", f"{head}^{{tree}}").strip() == tree
    return {"commit": commit, "ref": ref, "head": head, "dirty": not clean, "left_out": sorted(left_out)}


def _fit(path: Path) -> bool:
    if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _SECRET):
        return False
    return path.is_symlink() or (path.is_file() and path.stat().st_size <= _LARGEST)


def _identity(date: str) -> dict[str, str]:
    return {"NAME": _AUTHOR, "EMAIL": "regraft@invalid", "DATE": date}


def _head(top: Path) -> str | None:
    try:
        return _git(top, "rev-parse", "--verify", "--quiet", "HEAD").strip()
    except subprocess.CalledProcessError:
        return None


def git_user(root: Path) -> str | None:
    """Return the name in git's configuration, None where there is none; nothing else on the machine is asked."""
    try:
        return _git(root, "config", "user.name").strip() or None
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def _git(folder: Path, *arguments: str, env: dict[str, str] | None = None, stdin: str | None = None) -> str:
    """Run git there, deaf to what a hook that may have started us set, and without the user's own hooks."""
    inherited = {name: value for name, value in os.environ.items() if name not in {f"GIT_{part}" for part in _FOREIGN}}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "commit.gpgSign=false"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**inherited, "LC_ALL": "C", **(env or {})},
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=True,
        timeout=120,
    )
    return done.stdout
