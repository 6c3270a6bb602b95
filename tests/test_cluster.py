"""Calls on a Ray cluster of two nodes: what a process holds, what becomes of errors and deaths, and who is refused."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft import cluster
from regraft.cluster import ClusterPool, Given
from regraft.errors import DataError, MissingInput, RegraftError, ServiceUnavailable

pytestmark = pytest.mark.filterwarnings("ignore")


def pool(address: str, value: Any = None, made_of: Callable[[Any], dict[str, str]] | None = None) -> ClusterPool:
    def ready(value: Any) -> None:
        os.environ["REGRAFT_TEST_HOLDS"] = str(value)

    given = Given(value, ready, made_of or (lambda _: {"regraft": "1"}))
    return ClusterPool(address, given, piece="a part", fix="do it again")


@pytest.mark.service
def test_a_call_whose_process_dies_is_done_again_and_an_error_there_is_an_error_here(
    nodes: Any, tmp_path: Path
) -> None:
    def die_once(mark: Path) -> str:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse() -> None:
        raise DataError("row 3 is not one", fix="mend it")

    own = pool(nodes.address)
    try:
        assert own.workers == 2
        assert own.submit(die_once, tmp_path / "mark").result() == "done"
        with pytest.raises(DataError, match="row 3 is not one") as caught:
            own.submit(refuse).result()
        assert caught.value.fix == "mend it"
        with pytest.raises(RegraftError, match="the Ray cluster lost a part 4 times") as lost:
            own.submit(die).result()
        assert lost.value.fix == "do it again"
    finally:
        own.shutdown()


@pytest.mark.service
def test_a_process_is_made_ready_once_by_each_pool_that_asks_it(nodes: Any) -> None:
    def holds() -> tuple[int, str]:
        held = os.environ["REGRAFT_TEST_HOLDS"]
        os.environ["REGRAFT_TEST_HOLDS"] = held + "!"
        return os.getpid(), held

    first = pool(nodes.address, "a")
    try:
        seen = [first.submit(holds).result() for _ in range(6)]
        second = pool(nodes.address, "b")
        seen_then = [second.submit(holds).result() for _ in range(6)]
        second.shutdown()  # it found a connection and leaves it
        seen_last = [first.submit(holds).result() for _ in range(6)]
    finally:
        first.shutdown()
    for found, name in ((seen, "a"), (seen_then, "b"), (seen_last, "a")):
        times: dict[int, int] = {}
        for process, held in found:
            assert held == name + "!" * times.get(process, 0)
            times[process] = times.get(process, 0) + 1


@pytest.mark.service
def test_a_node_that_would_make_other_bytes_is_refused_with_what_is_other(nodes: Any) -> None:
    here = os.getpid()

    def made_of(_: Any) -> dict[str, str]:
        return {"pyarrow": "25", "regraft": "newer" if os.getpid() == here else "older"}

    def lacks(_: Any) -> dict[str, str]:
        if os.getpid() != here:
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return {}

    for tried, said in ((made_of, "it has other regraft than the machine that asks"), (lacks, "lacks .* 'pyarrow'")):
        own = pool(nodes.address, made_of=tried)
        try:
            with pytest.raises(RegraftError, match=said) as caught:
                own.submit(print).result()
        finally:
            own.shutdown()
        assert "requirements.lock" in (caught.value.fix or "")


@pytest.mark.service
def test_the_way_in_which_a_stage_ends_on_sigterm_stays(nodes: Any) -> None:
    def ours(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        own = pool(nodes.address)
        assert signal.getsignal(signal.SIGTERM) is ours
        own.shutdown()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_ray_or_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ServiceUnavailable, match="no Ray cluster answers at 127"):
        pool("127.0.0.1:9")
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingInput, match="ray is not installed"):
        pool("auto")


def test_a_cluster_that_is_started_here_reports_its_use_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray._common.usage import usage_lib

    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    told: list[bool] = []

    def init(**_: Any) -> None:
        told.append(usage_lib.usage_stats_enabled())
        raise ConnectionError("enough")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ServiceUnavailable):
        pool("local")
    assert told == [False]


def test_a_pool_asks_nothing_of_this_process_but_what_decides_the_bytes() -> None:
    given = Given(3, lambda _: pytest.fail("it is for the cluster's processes"), lambda value: {"value": str(value)})
    assert {**cluster._decisive(given), "python": ""} == {"python": "", "value": "3"}
