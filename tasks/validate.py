"""The task `validate`."""

from prefect import task
from prefect.artifacts import create_link_artifact

from regraft import steps
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="validate", tags=["regraft"], **OPTIONS)
def validate(layout: Layout, settings: Settings) -> StageResult:
    """Check the raw data against its contract, and show the data docs."""
    try:
        return steps.bring_up(layout, settings, "validate")
    finally:
        page = layout.docs / "index.html"
        if page.is_file():
            create_link_artifact(
                key="data-docs", link=page.absolute().as_uri(), description="Great Expectations' pages"
            )
