"""The flow `export`: merge a version and publish the proved files."""

from prefect import flow

from regraft import retrain, settings
from regraft.layout import Layout
from tasks.common import limited
from tasks.export import export as export_task


@flow(name="export", persist_result=False)
def export(version: str = "champion") -> str:
    """Export a version; returns the folder.

    Args:
        version: a number, an alias, or the beginning of an identity.
    """
    layout = Layout()
    with retrain.exclusive(layout):
        parameters = settings.load(layout)
        return str(limited(export_task, "export", parameters.retrain)(layout, parameters, version).folder)
