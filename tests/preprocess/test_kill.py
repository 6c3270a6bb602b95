"""The stage, killed anywhere, ends with the bytes of an undisturbed run when it is run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tokenizer_base: Path, write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """A clone in which `python -m regraft.preprocess` finds what it needs."""
    root = tmp_path / "clone"
    shutil.copytree(tokenizer_base, root / "data/work/model")
    shutil.copytree(write_rows(rows), root / "data/work/validate")
    (root / "params.yaml").write_text("preprocess: {max_length: 128}\n")
    return root


def stage(clone: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regraft.preprocess"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT), "REGRAFT_TESTING": "1", **extra},
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undisturbed(clone: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return what the stage makes, and the failpoints that it passes; both as if it had not run."""
    log = clone / "passed"
    done = stage(clone, REGRAFT_FAILPOINT_LOG=str(log))
    assert done.returncode == 0, done.stderr
    expected = files(clone / "data/work/preprocess")
    for name in ("preprocess", "cache"):
        shutil.rmtree(clone / "data/work" / name)
    passed: list[str] = []
    for name in log.read_text().split():
        passed.append(f"{name}@{1 + sum(each.split('@')[0] == name for each in passed)}")
    return expected, passed


def killed_and_repeated(clone: Path, failpoint: str, expected: dict[str, bytes]) -> None:
    killed = stage(clone, REGRAFT_FAILPOINT=failpoint)
    assert killed.returncode == -signal.SIGKILL
    finished = stage(clone)
    assert finished.returncode == 0, finished.stderr
    assert files(clone / "data/work/preprocess") == expected
    cache = clone / "data/work/cache/preprocess"
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []
    assert json.loads((clone / "data/work/outcomes/preprocess.json").read_text())["exit_code"] == 0


def test_killed_between_two_entries_of_its_cache_it_ends_with_the_undisturbed_bytes(clone: Path) -> None:
    expected, passed = undisturbed(clone)
    assert "preprocess.put@1" in passed
    killed_and_repeated(clone, "commit_dir.sealed@2", expected)


def test_killed_among_near_duplicates_its_next_run_sweeps_their_signatures(clone: Path) -> None:
    (clone / "params.yaml").write_text("preprocess: {max_length: 128, near_duplicates: 0.9}\n")
    assert stage(clone, REGRAFT_FAILPOINT="preprocess.twins").returncode == -signal.SIGKILL
    cache = clone / "data/work/cache/preprocess"
    assert [path.name[:7] for path in cache.glob(".*")] == [".twins-"]
    (clone / "params.yaml").write_text("preprocess: {max_length: 128}\n")  # so does one that looks for none
    finished = stage(clone)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in cache.glob(".*")] == []


@pytest.mark.faults
def test_a_kill_at_every_failpoint_of_preparation_ends_with_the_undisturbed_bytes(clone: Path) -> None:
    expected, passed = undisturbed(clone)
    assert len(passed) > 15
    for failpoint in passed:
        for name in ("preprocess", "cache"):
            shutil.rmtree(clone / "data/work" / name, ignore_errors=True)
        killed_and_repeated(clone, failpoint, expected)
