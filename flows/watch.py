"""The flow `watch`: look at the raw data once, and emit one event where it changed."""

import os
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger

from regraft import retrain, settings
from regraft import watch as library
from regraft.errors import ServiceUnavailable
from regraft.layout import Layout

RESOURCE = "regraft.data.raw"
"""The resource that the event is about; the trigger of the deployment `retrain` matches it."""


@flow(name="watch", persist_result=False)
def watch() -> None:
    """Look at the raw data of the worker's folder once."""
    seen = look(Layout())
    get_run_logger().info("%s: %s", seen.fingerprint[:16], seen.why)


def look(layout: Layout) -> library.Poll:
    """Look once, and emit the event if the data is new.

    Raises:
        ServiceUnavailable: the server did not accept the event; the next look emits it again.
    """
    parameters = settings.load(layout)
    return library.poll(
        layout,
        parameters.data.raw,
        settle=parameters.retrain.settle,
        trained=retrain.last_fingerprint(layout),
        emit=emit,
    )


def emit(fingerprint: str, event: str) -> None:
    """Post the event and wait until the server has taken it (`emit_event` would only queue it).

    Args:
        fingerprint: the payload.
        event: 32 hexadecimal digits; the same event twice is one event.

    Raises:
        ServiceUnavailable: the server did not take it.
    """
    import httpx
    from prefect.types._datetime import now

    body: dict[str, Any] = {
        "id": event,
        "occurred": now("UTC").isoformat(),
        "event": library.EVENT,
        "resource": {"prefect.resource.id": RESOURCE, "prefect.resource.name": "raw data"},
        "payload": {"fingerprint": fingerprint},
    }
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[body]).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceUnavailable(
            f"the Prefect server at {os.environ.get('PREFECT_API_URL', 'its default address')} did not take the event: "
            f"{type(error).__name__}",
            fix="see that the server runs; the next look emits the event again",
        ) from error
