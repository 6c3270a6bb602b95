"""The set-up of the README, as it stands: a server, two workers, and a second batch that somebody drops in."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import small_clone
from ruamel.yaml import YAML

from regraft.register.evidence import PREFIX


class Project:
    """A temporary clone with tiny settings, its Prefect server and its workers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root.parent / "logs"
        self.logs.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))
        }
        self.environment = {
            **kept,
            "PREFECT_HOME": str(root.parent / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *arguments: str) -> None:
        """Start a process in a group of its own, its output in a log."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    cwd=self.root,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with `--json`."""
        return subprocess.run(
            [sys.executable, "-m", "regraft", *arguments, "--json"],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def regraft(self, *arguments: str) -> Any:
        """Run a command with `--json` and return its answer."""
        done = self.command(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Ask the server's API."""
        answer = httpx.post(f"{self.environment['PREFECT_API_URL']}{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Flow runs that were started, oldest first (a schedule makes its runs ahead of time)."""
        begun = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
        found: list[dict[str, Any]] = self.ask(
            "/flow_runs/filter",
            {"flows": {"name": {"any_": [flow]}}, "flow_runs": begun, "sort": "START_TIME_ASC"},
        )
        return found

    def ended(self, flow: str) -> list[str]:
        """Names of the final states of a flow's runs."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return [run["state"]["name"] for run in self.runs(flow) if run["state"]["type"] in final]

    def wait(self, what: str, until: Callable[[], bool], seconds: float) -> None:
        """Wait for something, or fail with the ends of all logs."""
        deadline, last = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            try:
                if until():
                    return
            except httpx.TransportError as error:
                last = error  # the server is not up yet
            time.sleep(1)
        tails = {log.name: log.read_text(errors="replace")[-3000:] for log in sorted(self.logs.iterdir())}
        raise AssertionError(
            f"{what}: not within {seconds:.0f} s ({last})\n" + "\n".join(f"== {k}\n{v}" for k, v in tails.items())
        )

    def stop(self) -> None:
        """End every process group, whatever it takes."""
        for signum, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            for process in reversed(self.started):
                try:
                    os.killpg(process.pid, signum)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + patience
            while any(process.poll() is None for process in self.started) and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in self.started:
            process.wait()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    root = small_clone.small_clone(tmp_path / "clone")
    small_clone.set_params(root, {"retrain": {"placement": "pool", "settle": 1.0, "retry_delay": 1.0}})
    _look_often(root)
    made = Project(root)
    try:
        yield made
    finally:
        made.stop()


def _worker_process(project: Project, pool: str) -> psutil.Process:
    """The process of a worker itself."""
    started = next(p for p in project.started if isinstance(p.args, list) and p.args[-2:] == ["worker", pool])
    return psutil.Process(started.pid)


def _flow_process(project: Project, pool: str, flow: str) -> psutil.Process:
    """The process in which the newest run of a flow works: the topmost one that a worker started for it."""
    wanted = project.runs(flow)[-1]["id"]
    for process in _worker_process(project, pool).children(recursive=True):  # parents come first
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == wanted and "prefect.engine" in process.cmdline():
                return process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    raise AssertionError(f"no process works on the run {wanted}")


def _trainings(project: Project) -> set[str]:
    """Trainings that have left a checkpoint, by the name of their folder."""
    return {step.parent.name for step in project.root.glob("data/work/checkpoints/*/step-*")}


def _look_often(root: Path) -> None:
    yaml = YAML()
    deployments = yaml.load(root / "prefect.yaml")
    for deployment in deployments["deployments"]:
        if deployment["name"] == "watch":
            deployment["schedules"] = [{"interval": 10}]
        elif deployment["name"] == "retrain":
            del deployment["schedules"]  # this test is about the event
    yaml.dump(deployments, root / "prefect.yaml")


def registered(root: Path, key: str) -> list[str]:
    """Values of one of our tags on the registry's runs, in the order of their training."""
    with sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True) as store:
        rows = store.execute(
            "SELECT tags.value FROM tags JOIN runs USING (run_uuid) WHERE tags.key = ? ORDER BY runs.start_time",
            (f"{PREFIX}{key}",),
        ).fetchall()
    store.close()
    return [value for (value,) in rows]


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_batch_that_is_dropped_in_leads_to_exactly_one_retraining_across_both_pools(project: Project) -> None:
    project.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(project.port), "--no-ui")
    project.wait("the server", lambda: project.ask("/flows/count", {}) == 0, 180)
    assert set(project.regraft("deploy")["deployments"]) >= {"retrain/retrain", "watch/watch", "stage/stage"}
    project.start("worker-cpu", "regraft", "worker", "cpu")
    project.start("worker-gpu", "regraft", "worker", "gpu")

    # The first batch is new to this clone, so the watch asks for a first training by itself.
    project.wait("the first retraining", lambda: len(project.ended("retrain")) == 1, 600)
    assert project.ended("retrain") == ["Promoted"], project.runs("retrain")[0]["state"]["message"]
    first = json.loads((project.root / "data/work/train/report.json").read_text())["adapter_digest"]

    small_clone.second_batch(project.root)
    project.wait("the second retraining", lambda: len(project.ended("retrain")) == 2, 600)
    looks = len(project.ended("watch"))
    project.wait("three more looks", lambda: len(project.ended("watch")) >= looks + 3, 180)

    second = json.loads((project.root / "data/work/train/report.json").read_text())["adapter_digest"]
    assert len(project.runs("retrain")) == 2
    assert project.ended("retrain")[1] == "Promoted", project.runs("retrain")[1]["state"]["message"]
    assert project.regraft("status")["champion"]["number"] == 2
    assert [run["name"] for run in project.runs("stage")] == ["train", "evaluate"] * 2
    assert {run["work_pool_name"] for run in project.runs("stage")} == {"regraft-gpu"}
    assert {run["work_pool_name"] for run in project.runs("retrain")} == {"regraft-cpu"}
    assert registered(project.root, "adapter_digest") == [first, second]
    assert len(registered(project.root, "verdict_digest")) == 2


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_flow_is_taken_up_by_the_next_command_and_a_killed_worker_costs_nothing(
    project: Project, tmp_path: Path
) -> None:
    small_clone.set_params(project.root, {"train": {"max_steps": 600}})
    undisturbed = small_clone.small_clone(tmp_path / "undisturbed")
    small_clone.set_params(undisturbed, {"train": {"max_steps": 600}})
    subprocess.run(
        [sys.executable, "-m", "regraft", "train", "--with-upstream"],
        cwd=undisturbed,
        env=project.environment | {"PYTHONPATH": str(undisturbed)},
        check=True,
    )
    wanted = (undisturbed / "data/work/train/manifest.json").read_bytes()

    project.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(project.port), "--no-ui")
    project.wait("the server", lambda: project.ask("/flows/count", {}) == 0, 180)
    project.regraft("deploy")
    project.start("worker-cpu", "regraft", "worker", "cpu")
    project.start("worker-gpu", "regraft", "worker", "gpu")

    # The flow dies in the middle of training; the stage is another worker's and goes on.
    project.wait("a checkpoint", lambda: bool(_trainings(project)), 600)
    _flow_process(project, "cpu", "retrain").kill()
    project.wait("the end of the killed run", lambda: project.ended("retrain") == ["Crashed"], 400)
    deadline = time.monotonic() + 400
    while (again := project.command("retrain")).returncode == 4 and time.monotonic() < deadline:
        assert "the stage `train` is busy" in again.stderr  # one trainer at a time, whoever asks
        time.sleep(2)
    assert json.loads(again.stdout)["state"] == "promoted", again.stderr
    assert (project.root / "data/work/train/manifest.json").read_bytes() == wanted

    # The worker of the accelerators dies in the middle of training; what it had started goes on.
    known, ended = _trainings(project), len(project.ended("retrain"))
    small_clone.second_batch(project.root)
    project.wait("a checkpoint", lambda: bool(_trainings(project) - known), 600)
    _worker_process(project, "gpu").kill()
    project.start("worker-gpu-again", "regraft", "worker", "gpu")
    project.wait("the second retraining", lambda: len(project.ended("retrain")) > ended, 900)
    assert project.ended("retrain")[-1] == "Promoted", project.runs("retrain")[-1]["state"]["message"]
    assert project.regraft("status")["champion"]["number"] == 2
