"""`prefect.yaml` names what is there."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from ruamel.yaml import YAML

from flows.deploy import POOLS
from flows.watch import RESOURCE
from regraft.watch import EVENT
from tasks.pool import DEPLOYMENT, POOL

ROOT = Path(__file__).parent.parent.parent
CONTENT = YAML(typ="safe").load(ROOT / "prefect.yaml")
DEPLOYMENTS: dict[str, Any] = {each["name"]: each for each in CONTENT["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    path, name = deployment["entrypoint"].split(":")
    found = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(found, Flow)
    return found


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_a_deployment_is_of_a_flow_of_its_name_on_a_pool_that_is_made(name: str) -> None:
    assert flow_of(DEPLOYMENTS[name]).name == name
    assert DEPLOYMENTS[name]["work_pool"]["name"] in POOLS


def test_every_flow_has_a_deployment() -> None:
    modules = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__", "cli", "deploy", "server"}
    assert modules == set(DEPLOYMENTS)


def test_what_deployments_and_triggers_pass_are_parameters_of_their_flow() -> None:
    for deployment in DEPLOYMENTS.values():
        known = set(inspect.signature(flow_of(deployment).fn).parameters)
        assert set(deployment.get("parameters", {})) <= known
        for trigger in deployment.get("triggers", []):
            assert set(trigger["parameters"]) <= known


def test_the_trigger_of_retrain_is_for_the_event_that_watch_emits() -> None:
    (trigger,) = DEPLOYMENTS["retrain"]["triggers"]
    assert trigger["expect"] == [EVENT]
    assert trigger["match"] == {"prefect.resource.id": RESOURCE}
    assert trigger["parameters"] == {"fingerprint": "{{ event.payload.fingerprint }}"}


def test_one_retraining_at_a_time_and_no_change_is_dropped() -> None:
    assert DEPLOYMENTS["retrain"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_stages_that_need_an_accelerator_go_to_the_pool_that_the_task_waits_for() -> None:
    stage = DEPLOYMENTS["stage"]
    assert f"{flow_of(stage).name}/{stage['name']}" == DEPLOYMENT
    assert stage["work_pool"]["name"] == POOL
