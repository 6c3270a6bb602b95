"""The pointer and the policy for old exports."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import commit_dir
from regraft.errors import DamagedArtifact, RegraftError
from regraft.export.certificate import verify_export
from regraft.export.publish import point_latest, prune, publish

NAMES = [f"{number:016x}" for number in range(5)]


def folders(exports: Path, names: list[str]) -> None:
    for age, name in enumerate(names):
        (exports / name).mkdir(parents=True)
        (exports / name / "file").write_text(name)
        os.utime(exports / name, ns=(age * 10**9, age * 10**9))


def present(exports: Path) -> list[str]:
    return sorted(path.name for path in exports.iterdir())


def test_the_pointer_is_relative_so_that_the_folder_can_be_moved(tmp_path: Path) -> None:
    folders(tmp_path / "here", NAMES[:1])
    point_latest(tmp_path / "here", NAMES[0])

    (tmp_path / "here").rename(tmp_path / "there")

    assert (tmp_path / "there/latest/file").read_text() == NAMES[0]


def test_moving_the_pointer_leaves_nothing_else_behind(tmp_path: Path) -> None:
    folders(tmp_path, NAMES[:2])
    (tmp_path / ".latest.abcdef.tmp").symlink_to("nowhere")

    point_latest(tmp_path, NAMES[0])
    point_latest(tmp_path, NAMES[1])

    assert present(tmp_path) == [*NAMES[:2], "latest"]
    assert (tmp_path / "latest").readlink() == Path(NAMES[1])


def test_a_kill_before_the_pointer_moves_leaves_the_old_one(tmp_path: Path) -> None:
    folders(tmp_path, NAMES[:2])
    point_latest(tmp_path, NAMES[0])
    code = "import sys; from pathlib import Path; from regraft.export.publish import point_latest\n"
    code += "point_latest(Path(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "REGRAFT_FAILPOINT": "export.latest"}

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), NAMES[1]], env=environment, check=False)

    assert done.returncode == -9
    assert (tmp_path / "latest").readlink() == Path(NAMES[0])


def test_something_else_in_the_pointers_place_is_not_removed(tmp_path: Path) -> None:
    folders(tmp_path, [NAMES[0], "latest"])

    with pytest.raises(RegraftError, match="is not a symbolic link"):
        point_latest(tmp_path, NAMES[0])
    assert (tmp_path / "latest/file").read_text() == "latest"


def test_the_oldest_exports_beyond_keep_go_but_never_the_one_that_latest_names(tmp_path: Path) -> None:
    folders(tmp_path, NAMES)
    point_latest(tmp_path, NAMES[0])

    assert sorted(prune(tmp_path, 2)) == NAMES[1:4]
    assert present(tmp_path) == [NAMES[0], NAMES[4], "latest"]


def test_exports_that_are_needed_stay_even_beyond_keep(tmp_path: Path) -> None:
    folders(tmp_path, NAMES)
    point_latest(tmp_path, NAMES[0])

    assert sorted(prune(tmp_path, 1, {NAMES[1], NAMES[2]})) == NAMES[3:]
    assert present(tmp_path) == [*NAMES[:3], "latest"]


def test_only_exports_and_their_left_overs_are_ever_removed(tmp_path: Path) -> None:
    folders(tmp_path, [*NAMES[:2], "refused", ".work", "mine", f".{NAMES[2]}.0123456789ab.tmp"])
    point_latest(tmp_path, NAMES[1])

    assert prune(tmp_path, 1) == [NAMES[0]]
    assert present(tmp_path) == [".work", NAMES[1], "latest", "mine", "refused"]


def test_a_file_that_changed_after_it_was_verified_is_not_published(exported: Any, tmp_path: Path) -> None:
    with commit_dir(tmp_path / "candidate") as folder:
        (folder / "model.safetensors").write_bytes(b"verified")
    (tmp_path / "candidate/model.safetensors").write_bytes(b"altered!")

    with pytest.raises(DamagedArtifact, match=r"changed after it was verified: model\.safetensors"):
        publish(tmp_path / "candidate", {}, verify_export(exported.folder), tmp_path / "exports/0")
    assert not (tmp_path / "exports/0").exists()
