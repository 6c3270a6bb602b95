"""The commands of the flows, found by the entry point group `regraft.commands`; prefect is imported when one runs."""

import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.command import Json, Root, answer, clone, progress
from regraft.errors import RegraftError, ServiceUnavailable
from regraft.layout import Layout

HERE = Path()
_ROOM = 20  # MB; the shipped job's databases and reports take about a fifth of it, stages and export check their own
WHOLE, SERVER = "The whole job", "With a Prefect server"
commands = typer.Typer()


class Pool(StrEnum):
    """The work pools by their short names."""

    CPU = "cpu"
    GPU = "gpu"


@commands.command(rich_help_panel=WHOLE)
def retrain(
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what would run, why, and about how long; run nothing.")
    ] = False,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Run what changed: validate, prepare, train, evaluate, judge, register, promote, export."""
    from regraft import decision, settings
    from regraft import retrain as library

    layout = clone(root)
    parameters = settings.load(layout)
    if explain:
        found = library.plan(layout, parameters)
        said = decision.foreseen(layout, parameters, found.steps)
        answer({**found.to_dict(), "data": said}, [*found.lines(), *said], as_json=as_json)
        return
    with library.exclusive(layout):
        seen = library.fingerprint_now(layout, parameters)  # before the plan: what comes later is new data
        found = library.plan(layout, parameters)
        if found.steps:
            progress(f"to do: {', '.join(found.steps)}")
            outcome = library.Outcome.model_validate(_run_flow(layout))
        else:
            outcome = library.remember(layout, parameters, found, seen)
    answer(outcome.to_dict(), outcome.lines, as_json=as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


@commands.command(rich_help_panel=SERVER)
def deploy(root: Root = HERE, as_json: Json = False) -> None:
    """Set the Prefect server at PREFECT_API_URL up: work pools, deployments, automations. May be repeated."""
    layout = clone(root)
    from flows.deploy import deploy as set_up

    done = set_up(layout.root.resolve())
    lines = [
        f"The server at {done.server} has",
        *(f"  pool        {name}" for name in done.pools),
        *(f"  deployment  {name}" for name in done.deployments),
        *(f"  automation  {name}" for name in done.automations),
        "Start the workers: `regraft worker cpu` and `regraft worker gpu`",
    ]
    answer(vars(done), lines, as_json=as_json)


@commands.command(rich_help_panel=SERVER)
def worker(
    pool: Annotated[Pool, typer.Argument(help="Which work pool it serves: regraft-cpu or regraft-gpu.")],
    root: Root = HERE,
) -> None:
    """Be a worker in this clone, until a signal ends it."""
    layout = clone(root)
    from flows.deploy import work

    work(layout.root.resolve(), pool.value)


@commands.command(rich_help_panel=SERVER)
def watch(
    every: Annotated[
        float, typer.Option(min=0, help="Seconds between looks; 0 looks once. The deployment `watch` needs no command.")
    ] = 0,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Look whether the raw data changed, and tell the Prefect server at PREFECT_API_URL once for each change."""
    layout = clone(root)
    from flows.deploy import configured_server

    configured_server()
    from flows.watch import look

    while True:
        try:
            seen = look(layout)
            answer(vars(seen), [f"{seen.fingerprint[:16]}: {seen.why}"], as_json=as_json)
        except RegraftError as error:
            if not every:
                raise
            progress(f"error: {error}")
        if not every:
            return
        time.sleep(every)


def _run_flow(layout: Layout) -> dict[str, Any]:
    """Run the flow `retrain` here, on the configured Prefect server or on one that ends with this command.

    Raises:
        RegraftError: the disk is full before anything began.
        ServiceUnavailable: the server stopped answering in the middle, or failed.
    """
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.server import api

    # The databases of Prefect and MLflow do not say clearly that a disk is full.
    if (free := _free(layout)) < _ROOM:
        raise RegraftError(
            f"the disk that holds {layout.root.resolve()} has {free:.1f} MB free; a retraining needs {_ROOM} MB at least",
            fix="free some space, then run the same command again",
        )

    progress("starting Prefect")
    with api(layout.work / ".prefect"):
        from flows.retrain import retrain as flow

        try:
            outcome: dict[str, Any] = flow()  # type: ignore[assignment]
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ServiceUnavailable(
                f"the Prefect server failed in the middle ({first}; {_free(layout):.0f} MB of disk are free); "
                "the stages that were done are kept",
                fix="run the same command again to go on",
            ) from error
    return outcome


def _free(layout: Layout) -> float:
    """Free space of the disk that holds the clone, MB."""
    return shutil.disk_usage(layout.root).free / 1e6
