"""The stage as a process of its own: killed, preempted, and run again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regraft.model.params import ModelParams
from regraft.train.params import TrainParams

ROOT = Path(__file__).parents[2]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _clone(folder: Path, pinned: Path, dataset: Path, params: TrainParams) -> Path:
    """A clone in which `python -m regraft.train` finds what it needs."""
    sections = {"model": ModelParams().model_dump(mode="json"), "train": params.model_dump(mode="json")}
    shutil.copytree(pinned, folder / "data/work/model")
    shutil.copytree(dataset, folder / "data/work/preprocess")
    (folder / "params.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return folder


@pytest.fixture
def clone(pinned: Path, dataset: Path, params: TrainParams, tmp_path: Path) -> Path:
    return _clone(tmp_path, pinned, dataset, params)


def _stage(clone: Path, failpoint: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regraft.train"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT), "REGRAFT_FAILPOINT": failpoint, **extra},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def expected(pinned: Path, dataset: Path, params: TrainParams, tmp_path: Path) -> dict[str, bytes]:
    from regraft.train.trainer import train

    out = tmp_path / "undisturbed/train"
    train(
        params, ModelParams(), base=pinned, dataset=dataset, out=out, checkpoints=tmp_path / "undisturbed/checkpoints"
    )
    return _bytes(out)


def test_killed_then_preempted_then_left_alone_it_ends_with_the_undisturbed_bytes(
    clone: Path, expected: dict[str, bytes]
) -> None:
    killed = _stage(clone, "train.checkpoint@2")
    assert killed.returncode == -signal.SIGKILL

    preempted = _stage(clone, "train.step@1=TERM")
    outcome = json.loads((clone / "data/work/outcomes/train.json").read_text())
    assert (preempted.returncode, outcome["exit_code"], outcome["error"]["type"]) == (5, 5, "Preempted")
    assert "after step 3 of 6" in preempted.stderr
    assert "Traceback" not in preempted.stderr

    finished = _stage(clone)
    assert finished.returncode == 0, finished.stderr
    assert _bytes(clone / "data/work/train") == expected
    assert json.loads((clone / "data/work/measurements/train.json").read_text())["resumed_from"] == "step-000003"


@pytest.mark.faults
def test_a_kill_at_every_failpoint_of_training_ends_with_the_undisturbed_bytes(
    clone: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    passages, work = tmp_path / "passages.log", clone / "data/work"
    with _forking(clone, REGRAFT_FAILPOINT_LOG=str(passages)) as stage:
        assert stage("") == 0
        points = _numbered(passages.read_text().split())
        assert {"train.step", "train.checkpoint", "train.checkpointed", "train.finish", "train.saved"} <= {
            point.partition("@")[0] for point in points
        }

        for point in points:
            _sweep(work)
            assert stage(point) == -signal.SIGKILL, point
            assert stage("") == 0, point
            assert _bytes(work / "train") == expected, point
            assert not list(work.glob(".*.tmp")), point


@pytest.mark.faults
@pytest.mark.timeout(1800)  # twenty signals and what is trained again in between, on cores that may be busy
def test_twenty_random_sigterms_each_end_with_a_checkpoint_and_the_undisturbed_bytes_come_out(
    pinned: Path, dataset: Path, params: TrainParams, tmp_path: Path
) -> None:
    """Each signal counts that came after the first new step: it stopped training, behind a checkpoint of its own."""
    params = params.model_copy(update={"max_steps": 120, "checkpoint_every": 30, "logging_every": 10})
    clone = _clone(tmp_path, pinned, dataset, params)
    chance, work, stopped, finished, early = random.Random(3), clone / "data/work", [], 0, 0
    with _forking(clone) as stage:
        began = time.monotonic()
        assert stage("") == 0
        whole = time.monotonic() - began
        expected = _bytes(work / "train")
        _sweep(work)
        while len(stopped) < 20:
            before = _newest(work)
            code = stage(f"- {chance.uniform(0, whole):.4f}")
            assert code in (0, 5), code
            if code == 5 and _newest(work) == before:
                early += 1  # before the first new step: nothing was lost, and nothing had to be saved
            elif code == 5:
                assert not (work / "train").exists()
                stopped.append(_newest(work))
            else:
                assert _bytes(work / "train") == expected
                finished += 1
                _sweep(work)
            assert finished + early < 200, f"signals came too early or too late to disturb anything: {stopped}"
        assert stage("") == 0
    assert _bytes(work / "train") == expected
    assert len(set(stopped)) > 10, f"they did not come at random: {stopped}"


def _newest(work: Path) -> str:
    """The name of the newest checkpoint, which is whole: the stage takes no other."""
    return max((folder.name for folder in work.glob("checkpoints/*/step-*")), default="")


def _sweep(work: Path) -> None:
    for left in ("train", "checkpoints"):
        shutil.rmtree(work / left, ignore_errors=True)


FORKING = """
import os, signal, sys, time
import bitsandbytes, datasets, peft, transformers
import regraft.train.loop, regraft.train.trainer
from regraft.stage import run_stage
from regraft.train.__main__ import Sections, body

for line in sys.stdin:
    point, _, delay = line.strip().partition(" ")
    child = os.fork()
    if child == 0:
        os.environ["REGRAFT_FAILPOINT"] = point.strip("-")
        os._exit(run_stage("train", Sections, body))
    if delay:
        time.sleep(float(delay))
        os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def _forking(clone: Path, **extra: str) -> Iterator[Callable[[str], int]]:
    """Give a function that runs the stage with a failpoint in a fork of a process that has imported everything."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
    with (
        (clone / "stage.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", FORKING],
            cwd=clone,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):

        def stage(failpoint: str) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            print(failpoint, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield stage


def _numbered(names: list[str]) -> list[str]:
    """Each passage by its number, the third and later ones of a repeated failpoint thinned to the last."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [f"{name}@{number}" for name, count in counts.items() for number in sorted({1, 2, count}) if number <= count]


@pytest.fixture(autouse=True)
def _no_failpoint_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGRAFT_FAILPOINT", raising=False)
