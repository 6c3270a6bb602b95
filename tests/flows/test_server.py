"""The embedded Prefect server ends with the command that needs it, however that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.server import api

ROOT = Path(__file__).parent.parent.parent


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home)}


@pytest.mark.slow
def test_the_server_answers_and_is_gone_a_moment_after_its_command_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom pathlib import Path\nfrom flows.server import api\n"
        "with api(Path('home')):\n    print(os.environ['PREFECT_API_URL'], flush=True)\n    time.sleep(300)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path / "home"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        (server,) = psutil.Process(process.pid).children()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _, alive = psutil.wait_procs([server], timeout=20)
    for each in alive:
        each.kill()
    assert alive == []


def test_a_configured_server_is_used_and_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    for name in ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "x")  # put back afterwards
    with api(tmp_path / "home"):
        assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom flows import server\nfrom regraft.errors import ServiceUnavailable\n"
        "server.sys = type('S', (), {'executable': '/bin/false'})\n"
        "try:\n    with server.api(Path('home')): pass\n"
        "except ServiceUnavailable as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the embedded Prefect server did not start (it ended with 1)" in done.stdout
    assert f"{tmp_path / 'home'}/server.log" in done.stdout
