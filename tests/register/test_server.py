"""The same against a real MLflow server: artefacts travel through it, and it may be killed in the middle."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import clones
import pytest

from regraft.artifacts import digest_json, verify_dir
from regraft.errors import DamagedArtifact, GateRefused, ServiceUnavailable
from regraft.layout import Layout
from regraft.lineage import lineage
from regraft.register import lookup
from regraft.register.fetch import fetch, read_verdict
from regraft.register.params import RegisterParams
from regraft.register.promote import promote, rollback
from regraft.register.registry import register
from regraft.tracking import MetricsTail

pytestmark = pytest.mark.service


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "served")]
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < end, (self.folder / "server.log").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.kill()


@pytest.fixture
def params(server: Server, request: pytest.FixtureRequest) -> RegisterParams:
    """A registered model of its own for each test."""
    name = f"model-{digest_json(request.node.name)[:8]}"
    return RegisterParams(tracking_uri=server.uri, model_name=name, experiment=name, timeout=10, patience=10)


Clone = Callable[..., Layout]


def test_a_version_goes_through_the_server_and_comes_back_whole(
    clone: Clone, params: RegisterParams, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = clone()
    clones.live(layout, "ab" * 32, clones.STEPS)
    with MetricsTail(params, layout, poll=0.1) as tail:
        pass
    first = register(params, layout=layout, resolved=clones.RESOLVED)
    assert (first.new, first.run_id) == (True, tail.run_id)
    assert register(params, layout=layout, resolved=clones.RESOLVED).new is False
    assert promote(params, layout).version.number == 1
    register(params, layout=clone(adapter="two", champion=first.adapter_digest), resolved=clones.RESOLVED)
    assert promote(params, layout).version.number == 2
    assert rollback(params, layout).version.number == 1
    found = lookup.champion(params, layout)
    assert found is not None
    assert verify_dir(fetch(found, tmp_path / "champion")) == first.manifest_digest
    assert lineage(found)["identity"]["digest"] == first.identity
    assert [each.action for each in lookup.ledger(params, layout)] == ["promote", "promote", "rollback"]
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_later_verdict_is_attached_through_the_server(clone: Clone, params: RegisterParams) -> None:
    layout = clone()
    register(params, layout=layout, resolved=clones.RESOLVED)
    digest = clones.judge(layout, "f" * 64)
    assert register(params, layout=layout, resolved=clones.RESOLVED).verdict_digest == digest
    found = lookup.challenger(params, layout)
    assert found is not None
    assert read_verdict(found).judged["champion"] == "f" * 64


def test_bytes_altered_on_the_server_are_not_promoted(clone: Clone, params: RegisterParams, server: Server) -> None:
    layout = clone(adapter="altered here")
    version = register(params, layout=layout, resolved=clones.RESOLVED)
    (path,) = (server.folder / "served").glob(
        f"{version.source.removeprefix('mlflow-artifacts:/')}/adapter/*.safetensors"
    )
    path.write_bytes(b"other")
    with pytest.raises(DamagedArtifact):
        promote(params, layout)
    assert lookup.champion(params, layout) is None


def test_a_refused_adapter_leaves_its_run_on_the_server(clone: Clone, params: RegisterParams) -> None:
    with pytest.raises(GateRefused, match="kept as MLflow run"):
        register(params, layout=clone(passed=False), resolved=clones.RESOLVED)


def test_a_server_that_was_killed_is_given_up_and_registered_with_when_it_is_back(
    clone: Clone, params: RegisterParams, server: Server
) -> None:
    layout = clone()
    short = params.model_copy(update={"timeout": 1, "patience": 1})
    server.kill()
    try:
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable):
            register(short, layout=layout, resolved=clones.RESOLVED)
        assert time.monotonic() - started < 10
    finally:
        server.start()
    assert register(params, layout=layout, resolved=clones.RESOLVED).new is True
