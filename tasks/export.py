"""The task `export`."""

from prefect import task
from prefect.artifacts import create_link_artifact

from regraft import steps
from regraft.layout import Layout
from regraft.settings import Settings
from regraft.steps import Exported
from tasks.common import OPTIONS


@task(name="export", tags=["regraft", "gpu"], **OPTIONS)
def export(layout: Layout, settings: Settings, which: str = "champion") -> Exported:
    """Merge a version into its base, prove the files, and publish them."""
    done = steps.export_version(layout, settings, which)
    create_link_artifact(key="export", link=done.folder.absolute().as_uri(), link_text=f"version {done.version}")
    return done
