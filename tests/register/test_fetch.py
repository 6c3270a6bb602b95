"""fetch: a version's files, every byte checked, or nothing."""

from collections.abc import Callable
from pathlib import Path

import clones
import pytest

from regraft.artifacts import verify_dir
from regraft.errors import DamagedArtifact, MissingInput
from regraft.layout import Layout
from regraft.register.fetch import fetch
from regraft.register.registry import register
from regraft.register.version import Version


@pytest.fixture
def version(clone: Callable[..., Layout]) -> Version:
    return register(clones.PARAMS, layout=clone(), resolved=clones.RESOLVED)


def test_what_is_fetched_is_what_was_registered(version: Version, tmp_path: Path) -> None:
    folder = fetch(version, tmp_path / "champion")
    assert verify_dir(folder) == version.manifest_digest
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == b"one"


def test_fetched_again_nothing_is_written(version: Version, tmp_path: Path) -> None:
    folder = fetch(version, tmp_path / "champion")
    before = folder.stat().st_ino
    fetch(version, folder)
    assert folder.stat().st_ino == before


def test_an_altered_local_copy_is_replaced(version: Version, tmp_path: Path) -> None:
    folder = fetch(version, tmp_path / "champion")
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"two")
    fetch(version, folder)
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == b"one"


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "reports/train.json", "answers.parquet"])
def test_an_altered_byte_in_the_registry_is_refused_and_the_old_copy_stays(
    version: Version, tmp_path: Path, name: str
) -> None:
    old = tmp_path / "champion"
    old.mkdir()
    (old / "old").write_text("old")
    path = Path(version.source) / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DamagedArtifact, match=name):
        fetch(version, old)
    assert [each.name for each in old.iterdir()] == ["old"]


def test_a_file_that_was_not_registered_is_refused(version: Version, tmp_path: Path) -> None:
    (Path(version.source) / "adapter/adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(DamagedArtifact, match=r"adapter/adapter_model\.bin: not in the manifest"):
        fetch(version, tmp_path / "champion")


def test_lost_files_are_named(version: Version, tmp_path: Path) -> None:
    (Path(version.source) / "manifest.json").unlink()
    with pytest.raises(MissingInput, match="the files of regraft version 1 are not at"):
        fetch(version, tmp_path / "champion")
