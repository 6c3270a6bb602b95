"""Fixtures for all tests: no telemetry, no hub, a tiny base model, the shared real data where it is present."""

import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    REGRAFT_TESTING="1",
)
ROOT = Path(__file__).parent.parent


sys.path.append(str(ROOT / "tests"))  # `import tiny`, `small_clone` and `clones`, here and in tests' own processes


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama (read it, don't write into it)."""
    import tiny

    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite store (copy it)."""
    from regraft.register.service import initialise, prepare_mlflow

    prepare_mlflow(2)
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    initialise(file)
    return file


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for each in taken:
            each.close()
        thread.join(5)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each: `nodes.address`."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            found.add_node(num_cpus=1)
        except Exception:  # noqa: BLE001 - Ray raises no other; on a busy machine a node takes longer than it waits
            found.add_node(num_cpus=1)
        yield found
        found.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared real data; skips where there is none (`.ci/run` fails if that happens there)."""
    folder = Path(os.environ.get("REGRAFT_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        if os.environ.get("REGRAFT_REQUIRE_SHARED"):
            pytest.fail(f"no shared data at {folder}, and REGRAFT_REQUIRE_SHARED is set")
        pytest.skip(f"no shared data at {folder}: set REGRAFT_SHARED")
    return folder


@pytest.fixture(autouse=True)
def _fresh_failpoints() -> None:
    """Count the passages of failpoints anew in each test."""
    from regraft import failpoints

    failpoints._passages.clear()


@pytest.fixture(autouse=True)
def _no_prefect_beside_a_property(request: pytest.FixtureRequest) -> None:
    """Stop the services that flows left in this process before a test of Hypothesis runs.

    Their websocket draws from the global `random` for each ping, and Hypothesis takes that for a strategy which does.
    """
    worker = sys.modules.get("prefect.events.worker")
    if worker is not None and getattr(request.function, "is_hypothesis_test", False):
        _, late = worker.EventsWorker.drain_all(timeout=60)
        assert not late, "Prefect's services did not end"
