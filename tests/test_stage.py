"""A stage as a process: its outcome survives DVC, one at a time, and no orphan goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGE = """
import sys, time
from regraft.errors import GateRefused, Preempted
from regraft.params import Section
from regraft.stage import run_stage

class Inner(Section):
    seconds: float = 0
    ends: str = "well"

class Sections(Section):
    train: Inner

def body(params, layout):
    print("started", flush=True)
    time.sleep(params.train.seconds)
    match params.train.ends:
        case "refused": raise GateRefused("loss is NaN", fix="lower train.learning_rate")
        case "preempted": raise Preempted("stopped at step 7", fix="regraft train")
        case "bug": raise ZeroDivisionError("division by zero")

sys.exit(run_stage("train", Sections, body))
"""


def start(root: Path, params: str, **environment: str) -> subprocess.Popen[str]:
    (root / "params.yaml").write_text(params)
    return subprocess.Popen(
        [sys.executable, "-c", STAGE],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k != "REGRAFT_CALLER"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(root: Path) -> dict[str, object]:
    return json.loads((root / "data/work/outcomes/train.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("params", "code", "error"),
    [
        ("train: {}\n", 0, None),
        (
            "train: {ends: refused}\n",
            3,
            {"type": "GateRefused", "message": "loss is NaN", "fix": "lower train.learning_rate"},
        ),
        (
            "train: {ends: preempted}\n",
            5,
            {"type": "Preempted", "message": "stopped at step 7", "fix": "regraft train"},
        ),
    ],
)
def test_the_outcome_holds_exit_code_error_and_run(tmp_path: Path, params: str, code: int, error: object) -> None:
    process = start(tmp_path, params, REGRAFT_RUN="abc")
    _, stderr = process.communicate()
    assert process.returncode == code
    found = outcome(tmp_path)
    assert (found["exit_code"], found["error"], found["run"]) == (code, error, "abc")
    assert "Traceback" not in stderr


def test_a_bug_gives_one_line_to_the_user_and_the_trace_to_the_outcome(tmp_path: Path) -> None:
    process = start(tmp_path, "train: {ends: bug}\n")
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.startswith("train: ZeroDivisionError: division by zero\n  next: read the trace in data/work/outcomes")
    assert "Traceback" not in stderr
    assert "Traceback" in str(outcome(tmp_path)["error"])


def test_wrong_parameters_end_with_2_and_all_mistakes(tmp_path: Path) -> None:
    process = start(tmp_path, "train: {second: 1, ends: 3}\n")
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert "has 2 mistakes" in stderr
    assert "did you mean `seconds`?" in stderr


def test_a_second_starter_is_told_busy_and_leaves_the_first_ones_outcome_alone(tmp_path: Path) -> None:
    first = start(tmp_path, "train: {seconds: 30}\n", REGRAFT_RUN="first")
    assert first.stdout is not None
    assert first.stdout.readline() == "started\n"
    second = start(tmp_path, "train: {}\n", REGRAFT_RUN="second")
    _, stderr = second.communicate()
    assert second.returncode == 4
    assert f"is busy: process {first.pid} holds" in stderr
    assert not (tmp_path / "data/work/outcomes/train.json").exists()
    first.terminate()
    first.communicate()


@pytest.mark.parametrize("named", [True, False])
def test_a_stage_whose_starter_is_killed_gets_a_sigterm(tmp_path: Path, named: bool) -> None:
    (tmp_path / "params.yaml").write_text("train: {seconds: 60}\n")
    (tmp_path / "stage.py").write_text(STAGE)
    starter_code = (
        "import os,subprocess,sys,time\n"
        + ("os.environ['REGRAFT_CALLER'] = str(os.getpid())\n" if named else "os.environ.pop('REGRAFT_CALLER', None)\n")
        + "p = subprocess.Popen([sys.executable, 'stage.py'], start_new_session=True)\nprint(p.pid, flush=True)\ntime.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", starter_code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    stage = int(starter.stdout.readline())
    assert starter.stdout.readline() == "started\n"
    time.sleep(0.7)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{stage}").exists():
        time.sleep(0.1)
    gone = not Path(f"/proc/{stage}").exists()
    if not gone:
        os.kill(stage, signal.SIGKILL)
    starter.stdout.close()
    assert gone


def test_a_stage_whose_named_starter_is_already_gone_does_not_begin(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    process = start(tmp_path, "train: {}\n", REGRAFT_CALLER=str(dead.pid))
    stdout, stderr = process.communicate()
    assert process.returncode == 5
    assert stdout == ""
    assert "which started this stage, is gone" in stderr
