"""Setting a Prefect server up for this clone: work pools, deployments, and the automation that ends dead runs.

Everything may be repeated: what is there already is brought up to date, nothing is duplicated.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from regraft.errors import ParamsError, RegraftError, ServiceUnavailable

POOLS = {"regraft-cpu": None, "regraft-gpu": 1}
"""Work pools and how many flow runs each works on at once: the accelerators serve one stage at a time."""
ZOMBIES = "regraft: a run without a heartbeat has crashed"
_HEARTBEAT = 30  # seconds between the heartbeats of a flow run that `regraft worker` starts
_SILENCE = 10 * _HEARTBEAT


@dataclass(frozen=True)
class Deployed:
    """What the server has now."""

    server: str
    pools: list[str]
    deployments: list[str]
    automations: list[str]


def deploy(root: Path) -> Deployed:
    """Make the work pools, apply `prefect.yaml`, and make the automation that ends dead runs.

    Args:
        root: the clone.

    Raises:
        ParamsError: no server is configured.
        ServiceUnavailable: it does not answer.
        RegraftError: it refuses `prefect.yaml`; with Prefect's own words.
    """
    import httpx

    server = configured_server()
    try:
        _make_pools()
        _apply(root)
        _make_automation()
        return _read_back(server)
    except httpx.HTTPError as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise ServiceUnavailable(
            f"the Prefect server at {server} does not answer as expected: {type(error).__name__} {first}",
            fix="prefect server start --background, then the same command again",
        ) from error


def work(root: Path, pool: str) -> NoReturn:
    """Become a worker of one of the pools, in this clone; SIGINT or SIGTERM ends it.

    Args:
        root: the clone in which flow runs work.
        pool: `cpu` or `gpu`.

    Raises:
        ParamsError: no server is configured.
    """
    configured_server()
    environment = {
        **os.environ,
        "REGRAFT_ROOT": str(root.resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "regraft",  # the library's lines belong to the flow run's log
        "DO_NOT_TRACK": "1",
    }
    arguments = ["-m", "prefect", "worker", "start", "--pool", f"regraft-{pool}", "--type", "process"]
    os.chdir(root)
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def configured_server() -> str:
    """Return the address of the configured server.

    Raises:
        ParamsError: there is none; an embedded one ends with its command and can't hold deployments.
    """
    server = os.environ.get("PREFECT_API_URL")
    if not server:
        raise ParamsError(
            "PREFECT_API_URL is not set: deployments need a server that stays",
            fix="prefect server start --background; export PREFECT_API_URL=http://127.0.0.1:4200/api",
        )
    return server


def _make_pools() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            try:
                client.read_work_pool(name)
            except ObjectNotFound:
                template = ProcessWorker.get_default_base_job_template()
                client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))


def _apply(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml"],
        cwd=root,
        env={**os.environ, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        told = next(
            (line for line in reversed(words) if "Error" in line or "error" in line), (words or ["no message"])[-1]
        )
        raise RegraftError(f"Prefect refuses prefect.yaml: {told}", fix="mend prefect.yaml, then regraft deploy")


def _make_automation() -> None:
    """Mark runs of our deployments as crashed once their heartbeat stops, so that they do not hold the queue."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    beat = "prefect.flow-run.heartbeat"
    wanted = AutomationCore(
        name=ZOMBIES,
        description=f"No heartbeat for {_SILENCE} s and no final state: the process is gone.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.regraft"},
            for_each={"prefect.resource.id"},
            after={beat},
            expect={"prefect.flow-run.*"},  # the next heartbeat, or a final state, whatever its name
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_SILENCE),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its process is gone")],
    )
    with get_client(sync_client=True) as client:
        for found in client.read_automations_by_name(ZOMBIES):
            client.delete_automation(found.id)
        client.create_automation(wanted)


def _read_back(server: str) -> Deployed:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        deployments = sorted(f"{flows[each.flow_id]}/{each.name}" for each in client.read_deployments())
        automations = sorted(each.name for each in client.read_automations())
    return Deployed(server, list(POOLS), deployments, automations)
