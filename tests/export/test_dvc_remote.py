"""Publishing to a DVC remote: the bytes there, a `.dvc` file here that names them."""

import subprocess
import sys
from pathlib import Path

import pytest
import small

from regraft.cli import run
from regraft.errors import DamagedArtifact, ParamsError
from regraft.export import dvc_remote
from regraft.export.remote import publish_to
from regraft.export.standalone import merge_adapter


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=root, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "clone"
    root.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text(f"['remote \"store\"']\n    url = {tmp_path / 'remote'}\n")
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two different merges; read them, don't write into them."""
    root = tmp_path_factory.mktemp("merges")
    base = small.make_llama(root / "base")
    adapter = small.make_adapter(base, root / "adapter")
    for weight in (1, 2):
        merge_adapter(base, adapter, root / f"out{weight}", weight=weight)
    return [root / f"out{weight}" for weight in (1, 2)]


def test_an_export_comes_back_from_the_remote_as_it_was(merges: list[Path], clone: Path, tmp_path: Path) -> None:
    assert run(["publish", str(merges[0]), "dvc://store/models/support"]) == 0
    first = (clone / "models/support.dvc").read_bytes()
    assert not (clone / "models/support").exists()

    done = publish_to(merges[1], "dvc://store/models/support")

    assert done.moved
    assert (clone / "models/support.dvc").read_bytes() != first
    dvc(clone, "pull", "-r", "store", "models/support.dvc")
    assert small.contents(clone / "models/support") == small.contents(merges[1])


def test_publishing_again_changes_nothing(merges: list[Path], clone: Path) -> None:
    publish_to(merges[0], "dvc://store/support")

    assert publish_to(merges[0], "dvc://store/support").sent == 0


def test_other_bytes_in_the_remote_are_found_and_the_pointer_is_put_back(
    merges: list[Path], clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(merges[0], "dvc://store/support")
    before = (clone / "support.dvc").read_bytes()
    weights = (merges[1] / "model.safetensors").read_bytes()

    def damage(_: str) -> None:
        held = [path for path in (tmp_path / "remote").rglob("*") if path.is_file() and path.read_bytes() == weights]
        assert held
        for path in held:
            path.chmod(0o644)
            path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))

    monkeypatch.setattr(dvc_remote, "failpoint", damage)

    with pytest.raises(DamagedArtifact, match=r"model\.safetensors"):
        publish_to(merges[1], "dvc://store/support")

    assert (clone / "support.dvc").read_bytes() == before


def test_what_is_missing_in_the_remote_is_not_read_from_the_cache(
    merges: list[Path], clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(merges[0], "dvc://store/support")
    dvc(clone, "fetch", "-r", "store", "support.dvc")
    weights = (merges[0] / "model.safetensors").read_bytes()

    def lose(_: str) -> None:
        for path in [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]:
            if path.read_bytes() == weights:
                path.unlink()

    monkeypatch.setattr(dvc_remote, "failpoint", lose)

    with pytest.raises(DamagedArtifact, match=r"does not return support/model\.safetensors"):
        publish_to(merges[0], "dvc://store/support")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("dvc://elsewhere/support", "no remote elsewhere, but store"),
        ("dvc://store", "names no remote and path"),
        ("dvc://store/../outside", "names no remote and path"),
        ("dvc://store/taken", "taken is there"),
    ],
)
def test_what_cannot_be_published_is_refused(merges: list[Path], clone: Path, url: str, says: str) -> None:
    (clone / "taken").mkdir()

    with pytest.raises(ParamsError, match=says):
        publish_to(merges[0], url)


def test_outside_of_a_clone_it_says_so(merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ParamsError, match="no clone of a DVC project"):
        publish_to(merges[0], "dvc://store/support")
