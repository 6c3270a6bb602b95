"""The task `promote`."""

from prefect import task

from regraft import steps
from regraft.layout import Layout
from regraft.register.version import Version
from regraft.settings import Settings
from tasks.common import OPTIONS


@task(name="promote", tags=["regraft"], **OPTIONS)
def promote(layout: Layout, settings: Settings, which: str, reason: str | None = None) -> Version:
    """Make a version the champion, if its verdict allows it; returns the champion."""
    return steps.promote_if_passed(layout, settings, which, reason).version
