"""The command line: help for everything, the documented exit codes, and never a traceback."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from regraft import cli, errors, pipeline, settings
from regraft.errors import RegraftError
from regraft.layout import Layout

ROOT = Path(__file__).parent.parent
COMMAND = typer.main.get_command(cli.command_line())
COMMANDS = {  # those of a group by both names
    " ".join([name, *([each] if each else [])]): found
    for name, command in COMMAND.commands.items()  # type: ignore[attr-defined]
    for each, found in (getattr(command, "commands", None) or {"": command}).items()
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands change the working directory and listen to the library's log; both are put back."""
    monkeypatch.chdir(Path.cwd())
    yield
    logging.getLogger("regraft").handlers.clear()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that passes for a clone; its params.yaml is empty."""
    (tmp_path / "params.yaml").write_text("")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def test_the_commands_are_the_ones_that_are_documented() -> None:
    assert set(COMMANDS) == {
        *("model", "validate", "preprocess", "train", "evaluate", "register", "promote", "rollback", "export"),
        *("retrain", "lineage", "diff", "reproduce", "status", "deploy", "worker", "watch"),
        *("merge", "verify", "publish", "serve"),
        *("plan", "inspect", "parent"),
        *("data show", "data diff", "data page", "data forget"),
    }


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_every_argument_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert [each.name for each in command.params if not getattr(each, "help", None)] == []


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"worker"}))
def test_every_command_that_answers_can_answer_in_json(name: str) -> None:
    assert "--json" in {option for each in COMMANDS[name].params for option in each.opts}


def test_help_loads_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "prefect", "mlflow", "great_expectations", "dvc", "pyarrow", "numpy", "pandas"]
    code = (
        "import sys\nfrom regraft.cli import run\nassert run(['--help']) == 0\n"
        f"print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "retrain" in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MissingInput("m"), 1),
        (errors.ParamsError("m"), 2),
        (errors.GateRefused("m"), 3),
        (errors.Busy("m"), 4),
        (errors.Preempted("m"), 5),
        (errors.StageFailed("m", code=3), 3),
    ],
)
def test_an_error_is_a_message_a_next_command_and_the_documented_exit_code(
    error: RegraftError,
    code: int,
    clone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error.fix = "do this"

    def fail(layout: Layout) -> None:
        raise error

    monkeypatch.setattr(settings, "load", fail)
    assert cli.run(["status", "--root", str(clone)]) == code
    assert capsys.readouterr() == ("", "error: m\n  next: do this\n")


def test_an_error_with_json_is_an_object_on_stdout(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / "params.yaml").write_text("trian: {}\n")
    assert cli.run(["status", "--json", "--root", str(clone)]) == 2
    told = json.loads(capsys.readouterr().out)["error"]
    assert told["type"] == "ParamsError"
    assert told["exit_code"] == 2
    assert "did you mean `train`?" in told["message"]


def test_an_unexpected_error_is_one_line_and_its_trace_lies_in_a_file(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(layout: Layout) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(settings, "load", fail)
    assert cli.run(["status", "--root", str(clone)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: KeyError: 'surprise'\n  next: the trace is in data/work/outcomes/command.txt")
    assert "Traceback" not in told
    assert "Traceback" in (clone / "data/work/outcomes/command.txt").read_text()


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["retrain", "--nonsense"], ["worker"], ["worker", "tpu"], ["watch", "--every", "-1"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["retrain", "--root", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a clone of Regraft: it has no params.yaml and no dvc.yaml" in capsys.readouterr().err


def test_deployments_need_a_server_that_stays(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for arguments in (["deploy"], ["worker", "cpu"], ["watch"]):
        assert cli.run([*arguments, "--root", str(clone)]) == 2
        assert "PREFECT_API_URL is not set" in capsys.readouterr().err


def test_a_stage_with_upstream_runs_what_it_reads_in_order(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def repro(layout: Layout, stage: str, **_: object) -> pipeline.StageResult:
        ran.append(stage)
        return pipeline.StageResult(stage, True, 1.0)

    monkeypatch.setattr(settings, "load", lambda layout: None)
    monkeypatch.setattr(pipeline, "repro", repro)
    monkeypatch.setattr(pipeline, "require", lambda layout, stage: None)
    assert cli.run(["preprocess", "--with-upstream", "--json", "--root", str(clone)]) == 0
    assert ran == ["model", "validate", "preprocess"]
    assert json.loads(capsys.readouterr().out)["stages"][-1] == {"stage": "preprocess", "ran": True, "seconds": 1.0}


def test_a_signal_during_a_stage_reaches_the_stage_and_ends_the_command_with_5(clone: Path) -> None:
    """The stage here is a fake `dvc` that says it is ready, and ends well at SIGTERM after its checkpoint."""
    (clone / "dvc").mkdir()
    (clone / "dvc/__init__.py").write_text("")
    (clone / "dvc/__main__.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n    pathlib.Path('stopped').touch()\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(int(os.environ['REGRAFT_CALLER']), signal.SIGINT) if sys.argv[1] == 'repro' else sys.exit(0)\n"
        "time.sleep(30)\n"
    )
    code = (
        "import sys\nfrom regraft import cli, settings\nsettings.load = lambda layout: None\n"
        f"sys.exit(cli.run(['model', '--root', {str(clone)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(clone), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, (clone / "stopped").exists()) == (5, True), done.stderr
    assert "Traceback" not in done.stderr
