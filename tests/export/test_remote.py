"""Publishing to a store: every byte checked there, the pointer last, readers never see a mixture."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.cli import run
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, RegraftError, ServiceUnavailable
from regraft.export.remote import LATEST, latest_at, publish_to
from regraft.export.standalone import merge_adapter
from regraft.export.whole import verify_folder


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four different merges; read them, don't write into them."""
    root = tmp_path_factory.mktemp("merges")
    base = small.make_llama(root / "base")
    adapter = small.make_adapter(base, root / "adapter")
    for weight in (1, 2, 3, 4):
        merge_adapter(base, adapter, root / f"out{weight}", weight=weight)
    return [root / f"out{weight}" for weight in (1, 2, 3, 4)]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_store_holds_the_same_bytes_and_names_the_newest(merges: list[Path], tmp_path: Path, scheme: str) -> None:
    import fsspec

    url = f"{scheme}{tmp_path}/store"

    first, second = publish_to(merges[0], url), publish_to(merges[1], url)

    assert (first.moved, second.moved) == (True, True)
    assert latest_at(url).name == second.name
    assert latest_at(url).before == [first.name]
    fs, root = fsspec.core.url_to_fs(url)
    for path in merges[1].iterdir():
        assert fs.cat_file(f"{root}/{second.name}/{path.name}") == path.read_bytes()


def test_publishing_again_sends_nothing(merges: list[Path], tmp_path: Path, capsys: Any) -> None:
    publish_to(merges[0], str(tmp_path))
    before = small.contents(tmp_path)

    assert run(["publish", str(merges[0]), str(tmp_path), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["sent"] == 0
    assert small.contents(tmp_path) == before


def test_old_exports_go_when_keep_leaves_no_room(merges: list[Path], tmp_path: Path) -> None:
    names = [publish_to(merge, str(tmp_path), keep=2).name for merge in merges]

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[2:], LATEST])


@pytest.mark.parametrize("point", ["publish.file", "publish.file@3", "publish.manifest"])
def test_a_publication_killed_before_its_pointer_leaves_the_old_one_in_use(
    merges: list[Path], tmp_path: Path, point: str
) -> None:
    old = publish_to(merges[0], str(tmp_path))
    command = [sys.executable, "-m", "regraft", "publish", str(merges[1]), str(tmp_path)]

    killed = subprocess.run(command, env={**os.environ, "REGRAFT_FAILPOINT": point}, capture_output=True, check=False)
    assert killed.returncode == -9
    assert latest_at(str(tmp_path)).name == old.name
    again = publish_to(merges[1], str(tmp_path))

    assert latest_at(str(tmp_path)).name == again.name
    assert hashlib.sha256((tmp_path / again.name / "manifest.json").read_bytes()).hexdigest()[:16] == again.name


def test_a_file_that_was_damaged_in_the_store_is_sent_again(merges: list[Path], tmp_path: Path) -> None:
    name = publish_to(merges[0], str(tmp_path)).name
    (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / name / "foreign.bin").write_text("x")

    assert publish_to(merges[0], str(tmp_path)).sent == 1
    assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in merges[0].iterdir()}


def test_a_folder_that_does_not_verify_is_never_sent(merges: list[Path], tmp_path: Path) -> None:
    import shutil

    damaged = shutil.copytree(merges[0], tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")

    with pytest.raises(DamagedArtifact, match=r"config\.json"):
        publish_to(damaged, str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_store_that_returns_other_bytes_than_it_got_is_found(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def cut(_: Any, source: str, target: str, **__: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(LocalFileSystem, "put_file", cut)
    with pytest.raises(DamagedArtifact, match="after it was sent"):
        publish_to(merges[0], str(tmp_path / "store"))
    with pytest.raises(MissingInput, match="nothing was published"):
        latest_at(str(tmp_path / "store"))


def test_a_store_that_loses_the_manifest_s_bytes_is_found_before_the_pointer_moves(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def cut(_: Any, source: str, target: str, **__: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[: -1 if target.endswith("manifest.json") else None])

    old = publish_to(merges[0], str(tmp_path))
    monkeypatch.setattr(LocalFileSystem, "put_file", cut)
    with pytest.raises(DamagedArtifact, match=r"manifest\.json has the sha256 \w+ after it was sent"):
        publish_to(merges[1], str(tmp_path))
    assert latest_at(str(tmp_path)).name == old.name


@pytest.mark.parametrize("change", [{"before": ["../victim"]}, {"name": ""}, {"name": "../victim"}, {"manifest": "x"}])
def test_a_pointer_that_leads_out_of_the_store_is_refused_and_nothing_outside_is_touched(
    merges: list[Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    store, victim = tmp_path / "store", tmp_path / "victim"
    victim.mkdir()
    (victim / "keep.txt").write_text("mine")
    publish_to(merges[0], str(store))
    pointer = json.loads((store / LATEST).read_bytes())
    (store / LATEST).write_text(json.dumps({**pointer, **change}))
    before = small.contents(victim)

    with pytest.raises(DamagedArtifact, match="is not a pointer") as refusal:
        publish_to(merges[1], str(store), keep=1)

    assert "latest.json" in str(refusal.value)
    assert small.contents(victim) == before


def test_the_pointer_names_only_what_is_still_there_when_fewer_are_kept(merges: list[Path], tmp_path: Path) -> None:
    names = [publish_to(merge, str(tmp_path)).name for merge in merges[:3]]
    assert latest_at(str(tmp_path)).before == [names[1], names[0]]

    again = publish_to(merges[2], str(tmp_path), keep=2)

    assert (again.removed, again.moved) == ([names[0]], True)
    assert latest_at(str(tmp_path)).before == [names[1]]


@pytest.mark.parametrize("later", [1, 2])
def test_what_a_publication_left_behind_the_next_one_removes(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    old = publish_to(merges[0], str(tmp_path)).name
    monkeypatch.setenv("REGRAFT_FAILPOINT", "publish.latest@1=EIO")
    with pytest.raises(RegraftError, match="cannot be written"):
        publish_to(merges[1], str(tmp_path), keep=1)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    assert (tmp_path / old).is_dir()

    done = publish_to(merges[later], str(tmp_path), keep=2)

    assert (done.removed, done.moved) == ([old], later == 2)
    assert not (tmp_path / old).exists()
    again = publish_to(merges[later], str(tmp_path), keep=2)
    assert (again.removed, again.moved) == ([], False)


def test_what_was_to_be_removed_and_is_published_again_stays(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(merges[0], str(tmp_path))
    monkeypatch.setenv("REGRAFT_FAILPOINT", "publish.latest@1=EIO")
    with pytest.raises(RegraftError, match="cannot be written"):
        publish_to(merges[1], str(tmp_path), keep=1)
    monkeypatch.delenv("REGRAFT_FAILPOINT")

    back = publish_to(merges[0], str(tmp_path), keep=2)

    assert (back.removed, latest_at(str(tmp_path)).leaving) == ([], [])
    verify_folder(tmp_path / back.name)


def test_what_was_removed_and_is_sent_again_beside_the_latest_stays(merges: list[Path], tmp_path: Path) -> None:
    old, new = publish_to(merges[0], str(tmp_path)).name, publish_to(merges[1], str(tmp_path), keep=1).name
    assert not (tmp_path / old).exists()

    publish_to(merges[0], str(tmp_path), latest=False)
    assert latest_at(str(tmp_path)).name == new
    done = publish_to(merges[2], str(tmp_path), keep=2)

    assert done.removed == []
    verify_folder(tmp_path / old)


def test_what_another_publisher_points_at_meanwhile_is_not_removed(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.export import remote

    old = publish_to(merges[0], str(tmp_path))
    first = (tmp_path / LATEST).read_bytes()
    own = remote.failpoint

    def meanwhile(name: str) -> None:
        if name == "publish.latest":  # somebody went back to the old one, just now
            (tmp_path / LATEST).write_bytes(first)
        own(name)

    monkeypatch.setattr(remote, "failpoint", meanwhile)
    done = publish_to(merges[1], str(tmp_path), keep=1)

    assert done.removed == []
    assert latest_at(str(tmp_path)).name == old.name


def test_a_store_that_cannot_be_written_says_so_and_can_be_tried_again(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_FAILPOINT", "publish.file@2=ETIMEDOUT")
    with pytest.raises(RegraftError, match="cannot be written: TimeoutError"):
        publish_to(merges[0], str(tmp_path))
    monkeypatch.delenv("REGRAFT_FAILPOINT")

    assert publish_to(merges[0], str(tmp_path)).moved


def test_missing_keys_and_errors_of_a_stores_own_package_are_no_bug_of_ours(
    merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def failing(module: str, name: str) -> None:
        error = type(name, (Exception,), {"__module__": module})

        def put(*_: Any) -> None:
            raise error("no such thing")

        monkeypatch.setattr(LocalFileSystem, "put_file", put)

    failing("botocore.exceptions", "NoCredentialsError")
    with pytest.raises(ServiceUnavailable, match="cannot be written: NoCredentialsError") as refusal:
        publish_to(merges[0], str(tmp_path / "store"))
    assert "AWS_ACCESS_KEY_ID" in str(refusal.value.fix)
    failing("botocore.exceptions", "EndpointConnectionError")
    with pytest.raises(ServiceUnavailable, match=r"EndpointConnectionError.*\n  next: run the same command again"):
        publish_to(merges[0], str(tmp_path / "store"))
    failing("regraft.somewhere", "Mistake")
    with pytest.raises(Exception, match="no such thing") as mistake:
        publish_to(merges[0], str(tmp_path / "store"))
    assert type(mistake.value).__name__ == "Mistake"


def test_a_folder_that_is_nothing_of_ours_or_damaged_is_named_with_what_to_do(
    merges: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(MissingInput, match=r"has no manifest\.json\n  next: name an export, or a folder that"):
        publish_to(tmp_path, str(tmp_path / "store"))
    copy = shutil.copytree(merges[0], tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"config\.json: .*\n  next: copy it again"):
        publish_to(copy, str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"size": 1}}}']
)
def test_a_manifest_of_another_form_is_damage_and_no_bug(merges: list[Path], tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(merges[0], tmp_path / "copy")
    (copy / "manifest.json").write_text(text)

    with pytest.raises(DamagedArtifact, match=r"manifest\.json is no manifest: .*\n  next: copy it again"):
        verify_folder(copy)


def test_an_unknown_protocol_is_an_error(merges: list[Path]) -> None:
    with pytest.raises(ParamsError, match="novelty"):
        publish_to(merges[0], "novelty://bucket")


@pytest.mark.service
def test_an_s3_compatible_store_holds_the_same_bytes(
    merges: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Needs `moto[server]` and the extra `s3`."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="models")
        options = {"client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"}}

        published = [publish_to(merge, "s3://models/support", keep=2, options=options).name for merge in merges[:3]]

        assert latest_at("s3://models/support", options).name == published[2]
        assert publish_to(merges[2], "s3://models/support", keep=2, options=options).sent == 0
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        keys = {each["Key"] for each in client.list_objects_v2(Bucket="models")["Contents"]}
        assert {key.split("/")[1] for key in keys} == {*published[1:], LATEST}
        body = client.get_object(Bucket="models", Key=f"support/{published[2]}/model.safetensors")["Body"].read()
        assert body == (merges[2] / "model.safetensors").read_bytes()
    finally:
        server.stop()
