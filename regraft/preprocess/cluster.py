"""Shards prepared on a Ray cluster instead of this machine's cores; the output has the same bytes.

    REGRAFT_RAY=auto dvc repro preprocess          # a cluster that runs here; or its address, HOST:PORT
    REGRAFT_RAY=local                              # one of this machine's cores, to try it

A task is one shard: it reads its rows from `rows.parquet` and writes its entry of the cache, so both lie on a file system
that every node reaches at the same path, and Regraft is installed on every node. What a node that died was doing is done
again by another. Ray's tasks do this rather than its data sets: rows need not travel, and shards are cut by their content,
not by size (https://docs.ray.io/en/latest/ray-core/tasks.html).
"""

import logging
import platform
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_json
from regraft.errors import MissingInput, RegraftError, ServiceUnavailable
from regraft.model.pin import TOKENIZER_FILES, digest_files
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.shards import code_digest, versions

if TYPE_CHECKING:
    from regraft.model.load import Base

log = logging.getLogger("regraft.preprocess")
ADDRESS = "REGRAFT_RAY"
_TRIES = 3  # of a shard whose node died
_PATIENCE = 10  # seconds for a first answer
_state: dict[str, Any] = {}  # of a process of the cluster


class ClusterPool:
    """As much of `ProcessPoolExecutor` as preparation needs, on Ray."""

    def __init__(self, address: str, params: PreprocessParams, base: "Base") -> None:
        """Connect; `address` is that of a cluster, `auto` or `local`.

        Raises:
            MissingInput: Ray is not installed.
            ServiceUnavailable: no cluster answers there.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingInput(
                f"{ADDRESS} is {address}, but ray is not installed", fix="pip install 'regraft[ray]', or unset it"
            ) from error
        self._ray: Any = ray
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
        here = replace(
            base, folder=base.folder.absolute(), extended=base.extended.absolute() if base.extended else None
        )
        self._given = ray.put((params, here, _made_of(here)))
        self._task = ray.remote(num_cpus=1, max_retries=_TRIES)(_run)

    def submit(self, do: Callable[..., None], /, *arguments: Any) -> "ClusterFuture":
        """Let any node do it."""
        return ClusterFuture(self._ray, self._task.remote(self._given, do, arguments))

    def shutdown(self, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, if this pool came to it; what is not done is given up."""
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()


class ClusterFuture:
    """What a node will have done."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def result(self) -> None:
        """Wait for it.

        Raises:
            RegraftError: what it raised there, or that its nodes died too often.
        """
        try:
            self._ray.get(self._reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            raise RegraftError(
                f"the Ray cluster lost a shard {_TRIES + 1} times: {type(error).__name__}: {str(error)[:200]}",
                fix="give its nodes more memory, and run the same command again: what was prepared is kept",
            ) from error


def _knock(address: str) -> None:
    """See at once whether anybody listens; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _made_of(base: "Base") -> dict[str, str]:
    """What decides a shard's bytes besides rows and parameters: the code, the libraries, the tokenizer's files."""
    tokenizer = digest_json(digest_files(base.tokenizer, TOKENIZER_FILES))
    return {"regraft": code_digest(), "python": platform.python_version(), **versions(), "tokenizer": tokenizer}


def _run(
    given: tuple[PreprocessParams, "Base", dict[str, str]], do: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """In a process of the cluster: make ready what is asked for again and again, then do it."""
    from regraft.preprocess import work

    params, base, wanted = given
    if _state.get("given") != given:
        found = _made_of(base)
        if other := [name for name in wanted if found.get(name) != wanted[name]]:
            raise RegraftError(
                f"node {platform.node()} would make other bytes: it has other {', '.join(other)} than the machine that asks",
                fix="install the same requirements.lock and the same clone on every node",
            )
        _state["given"] = given
        work.become_worker(params, base)
    do(*arguments)
