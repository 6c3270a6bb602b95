"""The Prefect API that a command uses: the configured server, or one of its own that ends with the command.

Prefect would start a temporary server by itself, but a command killed with -9 leaves that one running. Ours watches
the process that started it and ends within a second of its death; it listens on loopback, on a port the kernel chose.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.errors import ServiceUnavailable

_START = 120.0  # seconds; 15-20 are usual on two cores, the first one also creates its database
QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
"""Environment of a command that runs flows: its own lines on the terminal, not Prefect's; nothing that calls home."""


@contextmanager
def api(home: Path) -> Iterator[None]:
    """Set `PREFECT_API_URL` for the block; it must be entered before prefect is imported.

    Args:
        home: where an embedded server keeps its database, unless `PREFECT_HOME` says otherwise.

    Raises:
        ServiceUnavailable: the embedded server did not come up.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    os.environ.setdefault("PREFECT_HOME", str(home.absolute()))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")  # it has no page to read them on
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        server = _start(listener.fileno(), Path(os.environ["PREFECT_HOME"]) / "server.log")
    try:
        _wait_until_healthy(url, server)
        os.environ["PREFECT_API_URL"] = url
        yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        _end(server)


def _start(descriptor: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    arguments = [sys.executable, "-m", "flows.server", str(descriptor), str(os.getpid())]
    with log.open("wb") as output:
        return subprocess.Popen(
            arguments,
            env=environment,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the flow; it needs the server to say how it ended
        )


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServiceUnavailable(
        "the embedded Prefect server did not start "
        + (f"(it ended with {server.returncode})" if server.returncode is not None else f"within {_START:.0f} s"),
        fix=f"read {os.environ['PREFECT_HOME']}/server.log, or set PREFECT_API_URL to a running server",
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def serve(descriptor: int, starter: int) -> None:
    """Serve the API on an inherited listening socket until SIGTERM, or until process `starter` is gone."""
    import uvicorn

    def follow() -> None:
        while os.getppid() == starter:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="follow-starter").start()
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
