"""Publishing to a hub: private, checked, `main` moved last and in one commit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import small

from regraft.cli import run
from regraft.errors import DamagedArtifact, ParamsError, ServiceUnavailable
from regraft.export.remote import publish_to
from regraft.export.standalone import merge_adapter

URL = "hf://team/support"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different merges; read them, don't write into them."""
    root = tmp_path_factory.mktemp("merges")
    base = small.make_llama(root / "base")
    adapter = small.make_adapter(base, root / "adapter")
    for weight in (1, 2, 3):
        merge_adapter(base, adapter, root / f"out{weight}", weight=weight)
    return [root / f"out{weight}" for weight in (1, 2, 3)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    from huggingface_hub import constants

    with hub_server.running() as server:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the storage protocol of the hub's own servers
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def without_own(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def test_main_and_a_branch_hold_the_export_in_a_private_repository(
    merges: list[Path], hub: hub_server.Hub, capsys: Any
) -> None:
    assert run(["publish", str(merges[0]), URL, "--json"]) == 0

    done = json.loads(capsys.readouterr().out)
    assert hub.private == {"team/support": True}
    assert done["moved"]
    assert done["sent"] == len(contents(merges[0]))
    assert without_own(hub.files("main")) == contents(merges[0])
    assert without_own(hub.files(f"export-{done['name']}")) == contents(merges[0])


def test_what_was_published_loads_from_the_hub(merges: list[Path], hub: hub_server.Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    publish_to(merges[0], URL)

    path = hf_hub_download("team/support", "model.safetensors", cache_dir=tmp_path, endpoint=hub.url)
    assert Path(path).read_bytes() == (merges[0] / "model.safetensors").read_bytes()


def test_another_export_takes_the_place_of_the_first_and_leaves_nothing_of_it(
    merges: list[Path], hub: hub_server.Hub
) -> None:
    first = publish_to(merges[0], URL)
    hub.commit("main", "by hand", {**hub.files("main"), "old.bin": b"of somebody else"})

    publish_to(merges[1], URL)

    assert without_own(hub.files("main")) == contents(merges[1])
    assert without_own(hub.files(f"export-{first.name}")) == contents(merges[0])


def test_publishing_again_commits_nothing(merges: list[Path], hub: hub_server.Hub) -> None:
    publish_to(merges[0], URL)
    before = dict(hub.branches)

    again = publish_to(merges[0], URL)

    assert (again.sent, again.moved) == (0, False)
    assert hub.branches == before


def test_old_branches_go_when_keep_leaves_no_room(merges: list[Path], hub: hub_server.Hub) -> None:
    names = [publish_to(merge, URL, keep=2).name for merge in merges]

    assert sorted(hub.branches) == sorted(["main", *(f"export-{name}" for name in names[1:])])


def test_main_stays_where_latest_is_not_wanted(merges: list[Path], hub: hub_server.Hub) -> None:
    publish_to(merges[0], URL)
    publish_to(merges[1], URL, latest=False)

    assert without_own(hub.files("main")) == contents(merges[0])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_byte_that_the_hub_changed_is_found_before_main_moves(
    merges: list[Path], hub: hub_server.Hub, name: str
) -> None:
    publish_to(merges[0], URL)
    hub.damage = name
    if name == "config.json":  # equal in both exports, so it would not be sent again
        hub.commit("main", "by hand", {n: d for n, d in hub.files("main").items() if n != name})

    with pytest.raises(DamagedArtifact, match=name):
        publish_to(merges[1], URL)

    assert hub.files("main")["model.safetensors"] == contents(merges[0])["model.safetensors"]


def test_killed_before_main_moved_the_old_export_is_served_and_the_same_command_goes_on(
    merges: list[Path], hub: hub_server.Hub
) -> None:
    publish_to(merges[0], URL)
    command = [sys.executable, "-m", "regraft", "publish", str(merges[1]), URL]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    killed = subprocess.run(
        command, env={**environment, "REGRAFT_FAILPOINT": "publish.manifest"}, capture_output=True, check=False
    )

    assert killed.returncode < 0
    assert without_own(hub.files("main")) == contents(merges[0])
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    assert without_own(hub.files("main")) == contents(merges[1])


def test_a_public_repository_is_refused_unless_it_is_meant(merges: list[Path], hub: hub_server.Hub) -> None:
    publish_to(merges[0], URL, private=False)
    assert hub.private == {"team/support": False}

    with pytest.raises(ParamsError, match="is public, and the export was to be private"):
        publish_to(merges[1], URL)
    publish_to(merges[1], URL, private=False)


def test_what_somebody_else_keeps_in_a_repository_is_not_deleted(merges: list[Path], hub: hub_server.Hub) -> None:
    hub.private["team/support"] = True
    hub.commit("main", "by hand", {".gitattributes": b"", "README.md": b"", "notes.md": b"ours"})

    with pytest.raises(ParamsError, match=r"1 files that no export of Regraft put there, first notes\.md"):
        publish_to(merges[0], URL)

    assert hub.files("main")["notes.md"] == b"ours"
    assert list(hub.branches) == ["main"]


def test_of_two_publishers_at_once_one_is_told_to_run_again(merges: list[Path], hub: hub_server.Hub) -> None:
    publish_to(merges[0], URL)
    hub.overtake = True

    with pytest.raises(ServiceUnavailable, match="somebody else committed there"):
        publish_to(merges[1], URL)

    publish_to(merges[1], URL)
    assert without_own(hub.files("main")) == contents(merges[1])


def test_a_refused_token_and_a_server_that_is_away_are_said(
    merges: list[Path], hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParamsError, match="names no repository"):
        publish_to(merges[0], "hf://support")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ParamsError, match="401"):
        publish_to(merges[0], URL)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServiceUnavailable, match="cannot be written"):
        publish_to(merges[0], URL)
