"""The task `evaluate`."""

from prefect import task

from regraft import steps
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.settings import Settings
from tasks import pool
from tasks.common import OPTIONS


@task(name="evaluate", tags=["regraft", "gpu"], **OPTIONS)
def evaluate(layout: Layout, settings: Settings) -> StageResult:
    """Let base and challenger answer the holdout."""
    if settings.retrain.placement == "pool":
        return pool.elsewhere(layout, "evaluate", patience=settings.retrain.pool_patience)
    return steps.bring_up(layout, settings, "evaluate")
