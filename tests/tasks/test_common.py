"""What is tried again, and for how long."""

import importlib
from pathlib import Path

import pytest
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from regraft.errors import Busy, GateRefused, MissingInput, ParamsError, Preempted, ServiceUnavailable, StageFailed
from regraft.layout import STAGES
from regraft.retrain_params import RetrainParams, Timeouts
from tasks.common import limited, worth_retrying

ROOT = Path(__file__).parent.parent.parent
STEPS = (*STAGES, "verdict", "register", "promote", "export")


def task_of(step: str) -> Task:  # type: ignore[type-arg]
    found = getattr(importlib.import_module(f"tasks.{step}"), step)
    assert isinstance(found, Task)
    return found


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Busy("b"), True),
        (ServiceUnavailable("s"), True),
        (GateRefused("g"), False),
        (ParamsError("p"), False),
        (Preempted("p"), False),
        (MissingInput("m"), False),
        (StageFailed("s", code=1), False),
        (TimeoutError("t"), False),
        (OSError("o"), False),
    ],
)
def test_only_what_time_can_mend_is_tried_again(error: Exception, again: bool) -> None:
    assert worth_retrying(None, None, Failed(data=error)) is again  # type: ignore[arg-type]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_one_task_of_its_name_that_caches_nothing_and_retries_only_what_is_worth_it(step: str) -> None:
    task = task_of(step)
    assert task.name == step
    assert task.cache_policy is NO_CACHE
    assert task.persist_result is False
    assert task.retry_condition_fn is worth_retrying
    assert "regraft" in task.tags


def test_a_task_gets_the_timeout_of_its_step_and_the_retries_of_the_section() -> None:
    params = RetrainParams(retries=3, retry_delay=10, timeouts=Timeouts(train=7))
    task = limited(task_of("train"), "train", params)
    assert (task.timeout_seconds, task.retries, task.retry_delay_seconds) == (7, 3, [10, 20, 40])
    assert task.retry_condition_fn is worth_retrying


def test_every_step_has_a_timeout() -> None:
    assert set(Timeouts().model_dump(by_alias=True)) == set(STEPS)
