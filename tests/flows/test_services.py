"""What flows leave running in the process of the tests."""

import contextlib
import random
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect._internal.concurrency.services import QueueService


class Pinging(QueueService[object]):
    """A service as a flow leaves one, whose thread draws from the global `random` as a websocket does for its pings."""

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        stopped = threading.Event()

        def ping() -> None:
            while not stopped.wait(0.001):
                random.getrandbits(32)

        thread = threading.Thread(target=ping)
        thread.start()
        yield
        stopped.set()
        thread.join()

    async def _handle(self, item: object) -> None:
        """There is nothing to do."""


@pytest.fixture(autouse=True, scope="module")
def service() -> Iterator[Pinging]:
    import prefect.events.worker  # noqa: F401 - as a flow does

    found = Pinging.instance()
    found.send(object())
    found.wait_until_empty()
    yield found
    found.drain()


def test_the_service_draws_from_the_global_random() -> None:
    before = random.getstate()
    threading.Event().wait(0.1)
    assert random.getstate() != before


@given(st.lists(st.integers(), min_size=50))
def test_a_property_is_not_disturbed_by_it(drawn: list[int]) -> None:
    assert len(drawn) >= 50
