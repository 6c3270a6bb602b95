"""commit_dir: whole or not at all, at every kill point, with every byte accounted for."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from regraft import artifacts
from regraft.artifacts import (
    MANIFEST,
    commit_dir,
    digest_bytes,
    dir_digest,
    hold,
    is_held,
    lock_holder,
    read_json,
    seal_dir,
    verify_dir,
    write_file,
    write_json,
)
from regraft.errors import Busy, DamagedArtifact, MissingInput, RegraftError

WRITER = """
import sys
from pathlib import Path
from regraft.artifacts import commit_dir
with commit_dir(Path(sys.argv[1])) as folder:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text(sys.argv[2])
    (folder / "sub/b.txt").write_text(sys.argv[2] * 2)
"""


def write_in_process(destination: Path, text: str, **environment: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(destination), text], env={**os.environ, **environment}, check=False
    ).returncode


def content(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
    }


def test_a_committed_folder_holds_what_was_written_and_a_manifest_of_it(tmp_path: Path) -> None:
    with commit_dir(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert content(tmp_path / "out") == {"a.txt": "one"}
    assert read_json(tmp_path / "out" / MANIFEST) == {
        "schema_version": 1,
        "files": {"a.txt": {"sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed", "size": 3}},
    }


def test_equal_content_has_an_equal_digest_and_other_content_another(tmp_path: Path) -> None:
    for name, text in (("x", "1"), ("y", "1"), ("z", "2")):
        with commit_dir(tmp_path / name) as folder:
            (folder / "f").write_text(text)
    assert verify_dir(tmp_path / "x") == verify_dir(tmp_path / "y") == dir_digest(tmp_path / "x")
    assert verify_dir(tmp_path / "z") != verify_dir(tmp_path / "x")


def test_an_error_in_the_block_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with commit_dir(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(KeyError), commit_dir(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
        raise KeyError
    assert content(tmp_path / "out") == {"a.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_at_every_point_the_folder_is_the_old_or_the_new_one_and_the_next_writer_cleans_up(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    assert write_in_process(tmp_path / "probe", "x", REGRAFT_FAILPOINT_LOG=str(log)) == 0
    points = list(dict.fromkeys(log.read_text().split()))
    assert points == [f"commit_dir.{p}" for p in ("begin", "written", "manifest", "sealed", "placed", "done")]
    old, new = {"a.txt": "old", "sub/b.txt": "oldold"}, {"a.txt": "new", "sub/b.txt": "newnew"}
    for point in points:
        out = tmp_path / point / "out"
        assert write_in_process(out, "old") == 0
        assert write_in_process(out, "new", REGRAFT_FAILPOINT=point) == -signal.SIGKILL
        verify_dir(out)
        assert content(out) == (new if point in ("commit_dir.placed", "commit_dir.done") else old), point
        with commit_dir(out) as folder:
            (folder / "a.txt").write_text("third")
        assert content(out) == {"a.txt": "third"}
        assert [p.name for p in out.parent.iterdir()] == ["out"], point


def test_a_reader_never_sees_a_mixture_or_a_gap_while_a_writer_replaces_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with commit_dir(out) as folder:
        (folder / "a").write_text("0")
    stop, seen, problems = threading.Event(), 0, []

    def read() -> None:
        nonlocal seen
        while not stop.is_set():
            descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            names = sorted(os.listdir(descriptor))  # noqa: PTH208 - by descriptor: the folder may be replaced meanwhile
            if names not in (["a", MANIFEST], []):  # empty: a replaced folder that was opened just before its removal
                problems.append(names)
            seen += 1
            os.close(descriptor)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        with commit_dir(out) as folder:
            (folder / "a").write_text(str(number))
    stop.set()
    reader.join()
    assert seen > 0
    assert [p for p in problems if p != [MANIFEST] and p != ["a"]] == []
    assert content(out) == {"a": "39"}


def test_two_writers_at_once_both_succeed_and_one_of_them_is_left_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(out), text]) for text in ("left", "right")]
    assert [p.wait() for p in both] == [0, 0]
    verify_dir(out)
    assert content(out)["a.txt"] in ("left", "right")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_writer_whose_new_folder_is_swept_away_by_another_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []
    real = os.open

    def open_after_the_sweep(path: Any, *more: Any, **settings: Any) -> int:
        if str(path).endswith(".tmp") and not swept:
            swept.append(str(path))
            artifacts._remove_leftovers(tmp_path / "out")
        return real(path, *more, **settings)

    monkeypatch.setattr(artifacts.os, "open", open_after_the_sweep)
    with commit_dir(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("whole")

    assert len(swept) == 1
    assert (tmp_path / "out/a.txt").read_text() == "whole"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "a.txt").write_text("onf"), "a.txt: its sha256 differs"),
        (lambda out: (out / "a.txt").write_text("longer"), "a.txt: 6 bytes, the manifest says 3"),
        (lambda out: (out / "a.txt").unlink(), "a.txt: missing"),
        (lambda out: (out / "new").write_text(""), "new: not in the manifest"),
    ],
)
def test_every_kind_of_damage_is_found_and_named(tmp_path: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    with commit_dir(out) as folder:
        (folder / "a.txt").write_text("one")
    damage(out)
    with pytest.raises(DamagedArtifact, match=says):
        verify_dir(out)


def test_a_folder_without_a_manifest_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(MissingInput, match="not whole"):
        dir_digest(tmp_path / "out")


def test_a_symbolic_link_is_refused_when_a_folder_is_sealed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(DamagedArtifact, match="symbolic link"):
        seal_dir(tmp_path)


def test_a_full_disk_is_said_and_the_old_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with commit_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    monkeypatch.setenv("REGRAFT_FAILPOINT", "commit_dir.manifest=ENOSPC")
    with pytest.raises(RegraftError, match=r"is full .* unchanged"), commit_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert content(tmp_path / "out") == {"a": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unrelated_error_is_not_dressed_up_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="boom") as caught, commit_dir(tmp_path / "out"):
        raise OSError(errno.EIO, "boom")
    assert not isinstance(caught.value, RegraftError)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"n": 1})
    monkeypatch.setenv("REGRAFT_FAILPOINT", "write_file.replace=EIO")
    with pytest.raises(OSError, match="Input/output"):
        write_file(tmp_path / "x.json", b"half")
    assert read_json(tmp_path / "x.json") == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_second_holder_is_told_who_holds_the_lock_and_gets_it_when_the_first_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "train.lock"
    code = "import sys,time\nfrom pathlib import Path\nfrom regraft.artifacts import hold\n" + (
        "with hold(Path(sys.argv[1]), 'train', {'caller': 7}):\n print('held', flush=True)\n time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert is_held(lock)
    assert lock_holder(lock) == {"pid": holder.pid, "caller": 7}
    with pytest.raises(Busy, match=f"train is busy: process {holder.pid}"), hold(lock, "train"):
        pass
    holder.kill()
    holder.communicate()
    assert not is_held(lock)
    with hold(lock, "train"):
        assert is_held(lock)


def test_unreadable_json_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{")
    with pytest.raises(DamagedArtifact, match="is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(MissingInput):
        read_json(tmp_path / "none.json")


def test_a_digest_that_was_taken_while_writing_is_not_taken_again(tmp_path: Path) -> None:
    digests: dict[str, str] = {}
    with commit_dir(tmp_path / "out", digests) as folder:
        (folder / "weights").write_bytes(b"as written")
        (folder / "card").write_text("read and digested here")
        digests["weights"] = digest_bytes(b"as written")
    assert verify_dir(tmp_path / "out")

    with commit_dir(tmp_path / "wrong", {"weights": digest_bytes(b"other")}) as folder:
        (folder / "weights").write_bytes(b"as written")
    with pytest.raises(DamagedArtifact, match="weights"):
        verify_dir(tmp_path / "wrong")


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_cache_does_without_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    waited: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        waited.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with commit_dir(tmp_path / "out", durable=durable) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "rows").write_bytes(b"1")

    temporary = [name for name in waited if name.startswith(".out")]
    expected = ["rows", "manifest.json", "inner", *temporary, tmp_path.name]
    assert sorted(waited) == (sorted(expected) if durable else [])
    assert len(temporary) == (1 if durable else 0)
    verify_dir(tmp_path / "out")
