"""A stage on the work pool `regraft-gpu`: a flow run of `stage/stage`, waited for.

Its worker must see this same folder (one file system for now): what the stage makes is not sent anywhere, and how it
ended comes back in a file under `data/work/pool/`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from regraft import errors
from regraft.artifacts import read_json, write_json
from regraft.errors import Exit, RegraftError, ServiceUnavailable, StageFailed
from regraft.layout import Layout
from regraft.pipeline import StageResult

DEPLOYMENT = "stage/stage"
POOL = "regraft-gpu"
_POLL = 2.0  # seconds


def elsewhere(layout: Layout, stage: str, *, patience: int) -> StageResult:
    """Run a stage on the GPU pool and wait for its end.

    Args:
        layout: the clone, on the file system that the pool's workers share.
        stage: one of the pure stages.
        patience: seconds that the run may wait for a worker.

    Raises:
        RegraftError: what the stage raised over there.
        ServiceUnavailable: there is no such deployment, no worker took the run, or its worker died.
    """
    ticket = f"{stage}-{time.time_ns()}"
    answer = _answer(layout, ticket)
    answer.parent.mkdir(parents=True, exist_ok=True)
    try:
        run = run_deployment(DEPLOYMENT, parameters={"name": stage, "ticket": ticket}, timeout=0)
    except ObjectNotFound as error:
        raise ServiceUnavailable(
            f"the Prefect server knows no deployment {DEPLOYMENT}, but `retrain.placement` is `pool`",
            fix="regraft deploy, or set retrain.placement to in_place",
        ) from error
    assert isinstance(run, FlowRun)  # outside of an event loop it is no coroutine
    state = _wait(run.id, stage, patience)
    return _read(answer, stage, state)


def here(layout: Layout, stage: str, ticket: str, bring_up: Callable[[], StageResult]) -> StageResult:
    """Run a stage on the worker's side and leave the answer for `elsewhere`, whichever way it ends."""
    answer = _answer(layout, ticket)
    try:
        result = bring_up()
    except RegraftError as error:
        code = error.code if isinstance(error, StageFailed) else None
        write_json(answer, {"error": type(error).__name__, "message": error.message, "fix": error.fix, "code": code})
        raise
    write_json(answer, {"ran": result.ran, "seconds": result.seconds})
    return result


def _wait(run: UUID, stage: str, patience: int) -> State:
    """Follow a flow run to its end; on an error or a signal here, it is cancelled there."""
    began, state = time.monotonic(), None
    with get_client(sync_client=True) as client:
        try:
            while True:
                state = client.read_flow_run(run).state
                if state is not None and state.is_final():
                    return state
                if (state is None or state.is_scheduled()) and time.monotonic() - began > patience:
                    raise ServiceUnavailable(
                        f"no worker of the pool {POOL} took `{stage}` within {patience} s",
                        fix="regraft worker gpu, on a machine that sees this folder",
                    )
                time.sleep(_POLL)
        finally:
            if state is None or not state.is_final():
                client.set_flow_run_state(run, Cancelling(message="whoever asked for it has gone"), force=True)


def _read(answer: Path, stage: str, state: State) -> StageResult:
    if not answer.is_file():
        raise ServiceUnavailable(
            f"`{stage}` ended on the pool {POOL} as {state.name} and left no answer in this folder: {state.message}",
            fix=f"read the log of its flow run, and see that the worker runs in this folder ({POOL})",
        )
    content = read_json(answer)
    answer.unlink()
    if "error" not in content:
        return StageResult(stage, bool(content["ran"]), float(content["seconds"]))
    kind = getattr(errors, content["error"], RegraftError)
    if kind is StageFailed:
        code = content["code"] or Exit.FAILED
        raise StageFailed(content["message"], fix=content["fix"], stage=stage, code=code)
    raise kind(content["message"], fix=content["fix"])


def _answer(layout: Layout, ticket: str) -> Path:
    return layout.work / "pool" / f"{ticket}.json"
