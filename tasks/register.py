"""The task `register`."""

from prefect import task
from prefect.artifacts import create_link_artifact

from regraft import steps
from regraft.layout import Layout
from regraft.register.version import Version
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="register", tags=["regraft"], **OPTIONS)
def register(layout: Layout, settings: Settings) -> Version | None:
    """Register the challenger with its evidence; None where the verdict is against it."""
    version = steps.register_challenger(layout, settings)
    if version is not None and version.uri.startswith(("http://", "https://")):
        link = f"{version.uri.rstrip('/')}/#/models/{version.name}/versions/{version.number}"
        create_link_artifact(key="version", link=link, link_text=version.label())
    return version
