"""The task `train`."""

from prefect import task

from regraft import steps
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.settings import Settings
from tasks import pool
from tasks.common import OPTIONS


@task(name="train", tags=["regraft", "gpu"], **OPTIONS)
def train(layout: Layout, settings: Settings) -> StageResult:
    """Train the challenger's adapter; it resumes from the newest whole checkpoint."""
    if settings.retrain.placement == "pool":
        return pool.elsewhere(layout, "train", patience=settings.retrain.pool_patience)
    return steps.bring_up(layout, settings, "train")
