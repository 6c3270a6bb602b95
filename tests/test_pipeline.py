"""Running stages through DVC: unchanged ones don't run, failures keep their own code, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from regraft import pipeline
from regraft.artifacts import is_held
from regraft.errors import Busy, MissingInput, Preempted, RegraftError, StageFailed
from regraft.layout import Layout

STAGE = """
import signal, sys, time
from pathlib import Path
from regraft.artifacts import commit_dir
from regraft.errors import GateRefused, Preempted
from regraft.params import Section
from regraft.stage import run_stage

class Inner(Section):
    x: int = 1
    seconds: float = 0
    ends: str = "well"

class Sections(Section):
    train: Inner

def body(params, layout):
    def stop(*_): raise Preempted("stopped", fix="again")
    signal.signal(signal.SIGTERM, stop)
    print("the stage runs", flush=True)
    Path("runs.txt").open("a").write("run\\n")
    time.sleep(params.train.seconds)
    if params.train.ends == "refused":
        raise GateRefused("loss is NaN", fix="lower it")
    with commit_dir(layout.stage("train")) as folder:
        (folder / "x").write_text(str(params.train.x))

sys.exit(run_stage("train", Sections, body))
"""
DVC = """
stages:
  train:
    cmd: python stage.py
    deps: [in.txt]
    params: [train]
    outs: [data/work/train]
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(DVC)
    (root / ".gitignore").write_text("/data/work/\n")
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def clone(template: Path, tmp_path: Path) -> Layout:
    subprocess.run(["cp", "-a", f"{template}/.", str(tmp_path)], check=True)
    (tmp_path / "in.txt").write_text("1")
    params(Layout(tmp_path), "train: {x: 1}\n")
    pipeline._stopped.clear()
    return Layout(tmp_path)


def params(layout: Layout, text: str) -> None:
    layout.params.write_text(text)


def runs(layout: Layout) -> int:
    path = layout.root / "runs.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_stage_runs_once_and_is_found_unchanged_and_an_old_state_comes_back_without_running(clone: Layout) -> None:
    lines: list[str] = []
    assert pipeline.repro(clone, "train", echo=lines.append).ran
    assert "the stage runs" in lines
    assert not pipeline.repro(clone, "train").ran
    assert pipeline.changed(clone) == {}
    params(clone, "train: {x: 2}\n")
    assert pipeline.changed(clone) == {
        "train": ["params.yaml train: modified"],
        "evaluate": ["`train` runs before it"],
    }
    assert pipeline.repro(clone, "train").ran
    params(clone, "train: {x: 1}\n")
    assert not pipeline.repro(clone, "train").ran
    assert (clone.stage("train") / "x").read_text() == "1"
    assert runs(clone) == 2


def test_a_failure_keeps_the_stages_own_code_and_message_and_the_old_outputs(clone: Layout) -> None:
    pipeline.repro(clone, "train")
    params(clone, "train: {x: 2, ends: refused}\n")
    with pytest.raises(StageFailed, match="loss is NaN") as caught:
        pipeline.repro(clone, "train")
    assert (caught.value.exit_code, caught.value.fix) == (3, "lower it")
    assert (clone.stage("train") / "x").read_text() == "1"


def test_a_signal_reaches_the_stage_and_the_old_outputs_come_back(clone: Layout) -> None:
    pipeline.repro(clone, "train")
    params(clone, "train: {x: 2, seconds: 60}\n")
    timer = threading.Thread(target=lambda: (_until(lambda: runs(clone) == 2), pipeline.stop_running(signal.SIGTERM)))
    timer.start()
    with pytest.raises(Preempted, match="stopped"):
        pipeline.repro(clone, "train")
    timer.join()
    assert (clone.stage("train") / "x").read_text() == "1"
    assert json.loads(clone.outcome("train").read_text())["exit_code"] == 5


def test_an_exception_in_the_middle_ends_the_stage_and_brings_the_old_outputs_back(clone: Layout) -> None:
    pipeline.repro(clone, "train")
    params(clone, "train: {x: 2, seconds: 60}\n")

    def interrupt(line: str) -> None:
        if line == "the stage runs":
            _until(lambda: runs(clone) == 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.repro(clone, "train", echo=interrupt)
    assert not is_held(clone.lock("train"))
    assert (clone.stage("train") / "x").read_text() == "1"


def test_only_a_signal_that_asks_to_stop_is_a_preemption_and_a_kill_is_a_failure() -> None:
    pipeline._stopped.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        assert isinstance(pipeline._failure("export", -number, None, []), Preempted)
    for number in (signal.SIGKILL, signal.SIGSEGV):
        failure = pipeline._failure("export", -number, None, ["merging"])
        assert isinstance(failure, StageFailed)
        assert failure.message == f"`export` ended without an outcome (ended by signal {int(number)}): merging"
        assert "if memory was short" in (failure.fix or "")


def test_a_live_runs_stage_is_busy_and_a_killed_runs_orphan_is_waited_for(clone: Layout) -> None:
    params(clone, "train: {x: 3, seconds: 20}\n")
    code = "import sys\nfrom pathlib import Path\nfrom regraft.layout import Layout\nfrom regraft.pipeline import repro\nrepro(Layout(Path(sys.argv[1])), 'train')"
    first = subprocess.Popen([sys.executable, "-c", code, str(clone.root)], env=os.environ)
    _until(lambda: runs(clone) == 1)
    with pytest.raises(Busy, match=f"started by process {first.pid}"):
        pipeline.repro(clone, "train")
    with pytest.raises(Busy, match=f"started by process {first.pid}"):
        pipeline.changed(clone)
    first.kill()
    first.wait()
    params(clone, "train: {x: 4}\n")
    assert list(pipeline.changed(clone)) == ["train", "evaluate"]
    assert pipeline.repro(clone, "train").ran
    assert (clone.stage("train") / "x").read_text() == "4"
    assert runs(clone) == 2


def test_the_way_back_is_said_where_an_input_is_missing_or_dvc_yaml_is_damaged(clone: Layout) -> None:
    with pytest.raises(MissingInput, match="needs the output of `model`") as caught:
        pipeline.require(clone, "train")
    assert caught.value.fix == "regraft model"
    (clone.root / "dvc.yaml").write_text("stages: [")
    with pytest.raises(RegraftError, match="DVC cannot say what changed"):
        pipeline.changed(clone)


def test_dvcs_changes_become_lines_that_name_file_and_parameter() -> None:
    entry = {"changed deps": {"data/raw": "modified", "params.yaml": {"train.rank": "new"}}}
    assert pipeline._reasons(entry) == ["data/raw: modified", "params.yaml train.rank: new"]
    assert pipeline._reasons({"changed outs": {"data/work/train": "deleted"}}) == ["output data/work/train: deleted"]
    assert pipeline._reasons("always changed") == ["always changed"]


def _until(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)
    assert condition()  # type: ignore[operator]
