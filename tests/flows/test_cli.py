"""What the commands of the flows say where a service or the disk fails."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import flows.retrain
import flows.server
from flows import cli
from regraft.errors import RegraftError, ServiceUnavailable
from regraft.layout import Layout


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let the flow raise, on a server that is not there."""
    monkeypatch.setattr(flows.server, "api", lambda _: nullcontext())

    def fails(error: Exception) -> None:
        def raising() -> Any:
            raise error

        monkeypatch.setattr(flows.retrain, "retrain", raising)

    return fails


def test_a_server_that_goes_away_in_the_middle_is_named_and_the_way_on_is_said(
    flow: Callable[[Exception], None], tmp_path: Path
) -> None:
    flow(httpx.ConnectError("[Errno 111] Connection refused"))
    with pytest.raises(ServiceUnavailable, match="stages that were done are kept") as caught:
        cli._run_flow(Layout(tmp_path))
    assert caught.value.fix == "run the same command again to go on"


def test_an_error_of_the_flows_own_is_not_taken_for_a_servers(
    flow: Callable[[Exception], None], tmp_path: Path
) -> None:
    flow(KeyError("mine"))
    with pytest.raises(KeyError, match="mine"):
        cli._run_flow(Layout(tmp_path))


def test_a_full_disk_is_found_before_anything_begins(
    flow: Callable[[Exception], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow(AssertionError("the flow was started"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(RegraftError, match=r"has 5\.0 MB free; a retraining needs 20 MB at least"):
        cli._run_flow(Layout(tmp_path))
