"""The code of a version is kept as a commit, and nothing that the user has is touched."""

import subprocess
from pathlib import Path

import pytest

from regraft.snapshot import git_user, keep_code


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("/work/\n")
    (folder / "params.yaml").write_text("train: {rank: 4}\n")
    return folder


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "x")


def kept(folder: Path, commit: str) -> set[str]:
    return set(git(folder, "ls-tree", "-r", "--name-only", commit).split())


def test_the_working_tree_is_kept_with_untracked_files_and_without_ignored_ones(repository: Path) -> None:
    commit(repository)
    (repository / "params.yaml").write_text("train: {rank: 8}\n")
    (repository / "new.py").write_text("x = 1\n")
    (repository / "work").mkdir()
    (repository / "work/rows").write_text("ignored")
    found = keep_code(repository)
    assert kept(repository, found["commit"]) == {".gitignore", "new.py", "params.yaml"}
    assert git(repository, "show", f"{found['commit']}:params.yaml") == "train: {rank: 8}\n"
    assert git(repository, "rev-parse", found["ref"]).strip() == found["commit"]
    assert found["ref"] == f"refs/regraft/{found['commit'][:16]}"
    assert git(repository, "rev-parse", f"{found['commit']}^").strip() == found["head"]
    assert (found["dirty"], found["left_out"]) == (True, [])


def test_head_index_and_files_stay_as_they_are(repository: Path) -> None:
    commit(repository)
    (repository / "params.yaml").write_text("changed\n")
    (repository / "staged.py").write_text("staged\n")
    git(repository, "add", "staged.py")
    (repository / "staged.py").write_text("changed after staging\n")

    def state() -> tuple[str, ...]:
        index = (repository / ".git/index").read_bytes().hex()
        return index, git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")

    before = state()
    found = keep_code(repository)
    assert state() == before
    assert git(repository, "show", f"{found['commit']}:staged.py") == "changed after staging\n"
    assert git(repository, "branch", "--format=%(refname:short)").split() == ["main"]


def test_equal_content_is_one_commit_however_often_it_is_kept(repository: Path) -> None:
    commit(repository)
    assert keep_code(repository) == keep_code(repository)
    assert len(git(repository, "for-each-ref", "refs/regraft/").splitlines()) == 1


def test_a_clean_tree_is_not_dirty(repository: Path) -> None:
    commit(repository)
    assert keep_code(repository)["dirty"] is False


def test_a_repository_without_a_commit_is_kept_too(repository: Path) -> None:
    found = keep_code(repository)
    assert kept(repository, found["commit"]) == {".gitignore", "params.yaml"}
    assert (found["head"], found["dirty"]) == (None, True)
    assert keep_code(repository) == found


def test_a_deleted_file_is_not_kept(repository: Path) -> None:
    commit(repository)
    (repository / "params.yaml").unlink()
    assert kept(repository, keep_code(repository)["commit"]) == {".gitignore"}


def test_secrets_and_large_untracked_files_are_left_out_and_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.snapshot._LARGEST", 100)
    (repository / ".env").write_text("TOKEN=1")
    (repository / "deploy.pem").write_text("KEY")
    (repository / "rows.jsonl").write_text("x" * 101)
    found = keep_code(repository)
    assert kept(repository, found["commit"]) == {".gitignore", "params.yaml"}
    assert found["left_out"] == [".env", "deploy.pem", "rows.jsonl"]


def test_names_with_spaces_and_newlines_are_kept(repository: Path) -> None:
    (repository / "a b\nc.py").write_text("x")
    found = keep_code(repository)
    assert "a b\nc.py" in git(repository, "ls-tree", "-r", "-z", "--name-only", found["commit"]).split("\0")


def test_a_clone_inside_a_repository_keeps_the_whole_repository(repository: Path) -> None:
    (repository / "part").mkdir()
    (repository / "part/code.py").write_text("x")
    assert kept(repository, keep_code(repository / "part")["commit"]) == {".gitignore", "params.yaml", "part/code.py"}


def test_a_hook_that_starts_us_does_not_lead_astray(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(repository)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent/index")
    assert keep_code(repository)["commit"] is not None


def test_without_a_repository_or_without_git_there_is_no_commit_but_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert keep_code(tmp_path) == {"commit": None, "reason": "the clone is not a git repository"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert keep_code(tmp_path) == {"commit": None, "reason": "git is not installed"}


def test_the_user_is_who_git_says_or_nobody(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    assert git_user(repository) is None
    git(repository, "config", "user.name", "Somebody")
    assert git_user(repository) == "Somebody"
