"""What every task shares: which failures are tried again, for how long, and how the parameters set it."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError

from regraft.errors import Busy, RegraftError, ServiceUnavailable
from regraft.retrain_params import RetrainParams

_P = ParamSpec("_P")
_R = TypeVar("_R")


def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Say yes only to what time can mend: a busy stage, a service that did not answer. A gate's no is an answer."""
    return isinstance(state.data, Busy | ServiceUnavailable)


OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,  # Prefect would hash a path, not its bytes; DVC decides what runs
    "persist_result": False,
    "retry_condition_fn": worth_retrying,
}
"""Options of every task."""


def limited(task: Task[_P, _R], step: str, params: RetrainParams) -> Task[_P, _R]:
    """Return the task with the timeout and the retries that the section `retrain` gives to a step."""
    delays = [min(params.retry_delay * 2**attempt, 3600.0) for attempt in range(params.retries)]
    return task.with_options(
        timeout_seconds=params.timeouts.of(step), retries=params.retries, retry_delay_seconds=delays or 0
    )


def bounded(task: Task[_P, _R], step: str, params: RetrainParams) -> Callable[_P, _R]:
    """Return a function that runs the task as `limited` does, and says which parameter ended it where one did.

    Raises:
        RegraftError: the step took longer than its timeout.
    """

    @wraps(task.fn)
    def run(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return limited(task, step, params)(*arguments, **named)
        except TaskRunTimeoutError as error:
            raise RegraftError(
                f"`{step}` took longer than {params.timeouts.of(step)} s and was stopped",
                fix=f"raise retrain.timeouts.{step} in params.yaml, then run the same command again",
            ) from error

    return run


def let_the_library_speak() -> None:
    """Let the library's lines of progress through; a worker sends them to the flow run's log."""
    logging.getLogger("regraft").setLevel(logging.INFO)
