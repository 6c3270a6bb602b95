"""Work of a stage done on a Ray cluster instead of this machine's cores; the output has the same bytes.

    REGRAFT_RAY=auto dvc repro validate preprocess      # a cluster that runs here; or its address, HOST:PORT
    REGRAFT_RAY=local dvc repro validate preprocess     # one of this machine's cores, to try it

A stage gives every process of the cluster the same thing to hold, once, and then calls of its own functions; Regraft is installed
on every node. A node on which anything differs that decides the bytes is refused; what a node that died was doing is done again
by another. Ray's tasks do this rather than its data sets: a stage says what is done together, and in which order it is taken back
(https://docs.ray.io/en/latest/ray-core/tasks.html).
"""

import logging
import os
import platform
import signal
import socket
import uuid
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from regraft.errors import MissingInput, RegraftError, ServiceUnavailable

ADDRESS = "REGRAFT_RAY"
"""The environment variable with the cluster's address; empty or not set: this machine's cores."""
_TRIES = 3  # of a call whose node died
_PATIENCE = 10  # seconds for a first answer
_T = TypeVar("_T")
_held: dict[str, "Given"] = {}  # what a process of the cluster holds, by the pool that gave it


class Given(NamedTuple):
    """What every process of a cluster holds, and what must be the same there as here."""

    value: Any
    """What `ready` is called with; sent once to each process."""
    ready: Callable[[Any], None]
    """Makes a process ready; a function of a module, as is the next one."""
    made_of: Callable[[Any], dict[str, str]]
    """What decides the bytes besides the value, by name: code, libraries, files."""


class ClusterPool:
    """As much of `ProcessPoolExecutor` as stages need, on Ray."""

    def __init__(self, address: str, given: Given, *, piece: str, fix: str) -> None:
        """Connect.

        Args:
            address: of a cluster, `auto` or `local`.
            given: what every process is to hold.
            piece: what a call works on, such as `a shard`, for an error.
            fix: what to do where it was lost again and again.

        Raises:
            MissingInput: Ray is not installed.
            ServiceUnavailable: no cluster answers there.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here tells nobody
        try:
            import ray
        except ImportError as error:
            raise MissingInput(
                f"{ADDRESS} is {address}, but ray is not installed", fix="pip install 'regraft[ray]', or unset it"
            ) from error
        self._ray: Any = ray
        self._piece, self._fix = piece, fix
        self._mine = not ray.is_initialized()
        if self._mine:
            handler = signal.getsignal(signal.SIGTERM)
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="regraft")
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise ServiceUnavailable(
                    f"no Ray cluster answers at {address}: {str(error)[:200]}",
                    fix=f"start one (`ray start --head`), or unset {ADDRESS}",
                ) from error
            finally:
                if signal.getsignal(signal.SIGTERM) is not handler:
                    signal.signal(signal.SIGTERM, handler)  # Ray takes it; a stage has its own way to end
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        """Calls that the nodes of the cluster do at once, each on a core."""
        self._key = uuid.uuid4().hex
        self._given = ray.put((given, _decisive(given)))
        self._task = ray.remote(num_cpus=1, max_retries=_TRIES)(_run)

    def submit(self, do: Callable[..., _T], /, *arguments: Any) -> "ClusterFuture[_T]":
        """Let any node do it."""
        reference = self._task.remote(self._key, [self._given], do, arguments)  # in a list it is fetched when needed
        return ClusterFuture(self._ray, reference, self._piece, self._fix)

    def shutdown(self, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, if this pool came to it; what is not done is given up."""
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()


class ClusterFuture(Generic[_T]):
    """What a node will have done."""

    def __init__(self, ray: Any, reference: Any, piece: str, fix: str) -> None:
        self._ray, self._reference, self._piece, self._fix = ray, reference, piece, fix

    def result(self) -> _T:
        """Wait for it.

        Raises:
            RegraftError: what it raised there, or that its nodes died too often.
        """
        try:
            found: _T = self._ray.get(self._reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            raise RegraftError(
                f"the Ray cluster lost {self._piece} {_TRIES + 1} times: {type(error).__name__}: {str(error)[:200]}",
                fix=self._fix,
            ) from error
        return found


def _knock(address: str) -> None:
    """See at once whether anybody listens; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _decisive(given: Given) -> dict[str, str]:
    return {"python": platform.python_version(), **given.made_of(given.value)}


def _run(key: str, given: list[Any], do: Callable[..., _T], arguments: tuple[Any, ...]) -> _T:
    """In a process of the cluster: make ready what is asked for again and again, then do it."""
    if key not in _held:
        import ray

        asked, wanted = ray.get(given[0])
        try:
            found = _decisive(asked)
        except ImportError as error:
            raise RegraftError(
                f"node {platform.node()} lacks what the machine that asks has: {error}",
                fix="install the same requirements.lock and the same clone on every node",
            ) from error
        if other := sorted(name for name in {*wanted, *found} if found.get(name) != wanted.get(name)):
            raise RegraftError(
                f"node {platform.node()} would make other bytes: it has other {', '.join(other)} than the machine that asks",
                fix="install the same requirements.lock and the same clone on every node",
            )
        _held.clear()
        asked.ready(asked.value)
        _held[key] = asked
    return do(*arguments)
