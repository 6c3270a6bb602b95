"""The flow `stage`: one pure stage on the work pool that its deployment names (`regraft-gpu`)."""

from prefect import flow

from regraft import settings, steps
from regraft.errors import ParamsError
from regraft.layout import STAGES, Layout
from tasks import pool
from tasks.common import let_the_library_speak


@flow(name="stage", flow_run_name="{name}", persist_result=False)
def stage(name: str, ticket: str) -> None:
    """Bring one stage up to date in the worker's folder.

    Args:
        name: one of the pure stages.
        ticket: names the answer that `tasks.pool.elsewhere` waits for.
    """
    if name not in STAGES:
        raise ParamsError(f"{name} is not a stage; expected one of {', '.join(STAGES)}")
    let_the_library_speak()
    layout = Layout()
    pool.here(layout, name, ticket, lambda: steps.bring_up(layout, settings.load(layout), name))
