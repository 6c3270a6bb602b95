"""The task `preprocess`."""

from prefect import task

from regraft import steps
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="preprocess", tags=["regraft"], **OPTIONS)
def preprocess(layout: Layout, settings: Settings) -> StageResult:
    """Render, split, deduplicate and tokenise the accepted rows."""
    return steps.bring_up(layout, settings, "preprocess")
