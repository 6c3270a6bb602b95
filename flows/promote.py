"""The flow `promote`: a person's approval, as a deployment of its own."""

from prefect import flow

from regraft import retrain, settings
from regraft.errors import GateRefused
from regraft.layout import Layout
from regraft.register.lookup import version as find_version
from tasks.common import limited
from tasks.promote import promote as promote_task


@flow(name="promote", persist_result=False)
def promote(adapter: str, reason: str) -> int:
    """Promote the waiting challenger, if it is the adapter that was approved; returns its version number.

    Args:
        adapter: the first 8 or more characters of the adapter's digest that the person has looked at.
        reason: why; the ledger keeps it.
    """
    layout = Layout()
    with retrain.exclusive(layout):
        parameters = settings.load(layout)
        challenger = find_version(parameters.register_, layout, "challenger")
        if len(adapter) < 8 or not challenger.adapter_digest.startswith(adapter):
            raise GateRefused(
                f"the approval names the adapter {adapter}, the challenger (version {challenger.number}) is "
                f"{challenger.adapter_digest[:16]}",
                fix="look at the present challenger (`regraft status`), then approve its digest",
            )
        done = limited(promote_task, "promote", parameters.retrain)(
            layout, parameters, str(challenger.number), f"approved: {reason}"
        )
    return done.number
