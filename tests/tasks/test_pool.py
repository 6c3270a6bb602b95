"""What a stage on another worker says arrives where it was asked for."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Completed, Crashed, Running, Scheduled

from regraft.errors import Busy, Preempted, RegraftError, ServiceUnavailable, StageFailed
from regraft.layout import Layout
from regraft.pipeline import StageResult
from tasks import pool


class Client:
    """A Prefect client whose only flow run goes through the given states; the last one stays."""

    def __init__(self, states: list[State]) -> None:
        self.states = states
        self.set: list[State] = []

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run: object) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return FlowRun(flow_id=uuid4(), state=state)

    def set_flow_run_state(self, run: object, state: State, force: bool) -> None:
        self.set.append(state)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask for a stage elsewhere; `worker` plays the worker's side."""

    def elsewhere(worker: Any, states: list[State], patience: int = 60) -> tuple[Client, Any]:
        client = Client(states)
        layout = Layout(tmp_path)

        def deployed(name: str, parameters: dict[str, str], timeout: float) -> FlowRun:
            assert (name, timeout) == ("stage/stage", 0)
            if worker is not None:
                worker(layout, parameters["name"], parameters["ticket"])
            return FlowRun(flow_id=uuid4())

        monkeypatch.setattr(pool, "run_deployment", deployed)
        monkeypatch.setattr(pool, "get_client", lambda sync_client: client)
        monkeypatch.setattr(pool, "_POLL", 0.01)
        try:
            return client, pool.elsewhere(layout, "train", patience=patience)
        except RegraftError as error:
            return client, error

    return elsewhere


def worker_that(result: StageResult | RegraftError) -> Any:
    def work() -> StageResult:
        if isinstance(result, RegraftError):
            raise result
        return result

    def play(layout: Layout, name: str, ticket: str) -> None:
        if isinstance(result, RegraftError):  # the flow run over there fails, too
            with pytest.raises(type(result)):
                pool.here(layout, name, ticket, work)
        else:
            pool.here(layout, name, ticket, work)

    return play


def test_the_result_comes_back_and_the_answer_file_is_gone(ask: Any, tmp_path: Path) -> None:
    _, result = ask(worker_that(StageResult("train", True, 3.5)), [Scheduled(), Running(), Completed()])
    assert result == StageResult("train", True, 3.5)
    assert list((tmp_path / "data/work/pool").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [Busy("b", fix="f"), Preempted("p"), StageFailed("s", fix="f", stage="train", code=3), ServiceUnavailable("u")],
)
def test_an_error_comes_back_with_its_kind_message_next_step_and_code(error: RegraftError, ask: Any) -> None:
    _, found = ask(worker_that(error), [Running(), Crashed()])
    assert type(found) is type(error)
    assert (str(found), found.exit_code) == (str(error), error.exit_code)


def test_a_worker_that_died_leaves_no_answer_and_that_is_said(ask: Any) -> None:
    _, found = ask(None, [Running(), Crashed(message="no heartbeat")])
    assert isinstance(found, ServiceUnavailable)
    assert "ended on the pool regraft-gpu as Crashed and left no answer in this folder: no heartbeat" in found.message


def test_a_run_that_no_worker_takes_is_given_up_and_cancelled(ask: Any) -> None:
    client, found = ask(None, [Scheduled()], patience=0)
    assert isinstance(found, ServiceUnavailable)
    assert "no worker of the pool regraft-gpu took `train` within 0 s" in found.message
    assert [state.type for state in client.set] == [Cancelling().type]
