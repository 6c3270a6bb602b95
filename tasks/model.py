"""The task `model`."""

from prefect import task

from regraft import steps
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="model", tags=["regraft"], **OPTIONS)
def model(layout: Layout, settings: Settings) -> StageResult:
    """Make the base model ready, or check that it is the pinned one."""
    return steps.bring_up(layout, settings, "model")
