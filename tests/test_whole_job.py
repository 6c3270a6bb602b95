"""The whole job in a small clone: through DVC and through the flow, again, with new data, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_clone

from regraft.layout import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent


def environment(clone: Path) -> dict[str, str]:
    """The clone's own code comes first, and its own Prefect home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    return {**kept, "PYTHONPATH": str(clone), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def regraft(clone: Path, *arguments: str) -> tuple[int, Any]:
    """Run a command with `--json` and return its exit code and answer."""
    done = subprocess.run(
        [BIN / "regraft", *arguments, "--json"],
        cwd=clone,
        env=environment(clone),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else done.stderr


def manifests(clone: Path) -> dict[str, str]:
    return {stage: (clone / f"data/work/{stage}/manifest.json").read_text() for stage in STAGES}


def copy(clone: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-a", f"{clone}/.", str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def through_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = small_clone.small_clone(tmp_path_factory.mktemp("dvc") / "clone")
    subprocess.run([BIN / "dvc", "repro", "--quiet"], cwd=clone, env=environment(clone), check=True)
    return clone


@pytest.fixture(scope="module")
def through_flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    clone = small_clone.small_clone(tmp_path_factory.mktemp("flow") / "clone")
    code, outcome = regraft(clone, "retrain")
    assert code == 0, outcome
    return clone, outcome


def test_dvc_and_the_flow_give_the_same_bytes(through_dvc: Path, through_flow: tuple[Path, dict[str, Any]]) -> None:
    assert manifests(through_dvc) == manifests(through_flow[0])


def test_the_first_run_ends_with_a_champion_and_an_export_that_verifies(
    through_flow: tuple[Path, dict[str, Any]],
) -> None:
    clone, outcome = through_flow
    assert outcome["state"] == "promoted"
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=clone / "data/exports/latest", check=True)
    status = regraft(clone, "status")[1]
    assert status["champion"]["number"] == 1


def test_the_second_run_has_nothing_to_do(through_flow: tuple[Path, dict[str, Any]]) -> None:
    clone, _ = through_flow
    before = manifests(clone)
    code, outcome = regraft(clone, "retrain")
    assert (code, outcome["state"]) == (0, "nothing to do")
    assert manifests(clone) == before
    assert regraft(clone, "status")[1]["champion"]["number"] == 1


def test_a_changed_learning_rate_touches_training_and_what_follows_and_going_back_restores_without_training(
    through_flow: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    clone = copy(through_flow[0], tmp_path / "clone")
    before = manifests(clone)
    small_clone.set_params(clone, {"train": {"learning_rate": 5e-3}})
    _, plan = regraft(clone, "retrain", "--explain")
    assert [step for step in plan["steps"] if step in STAGES] == ["train", "evaluate"]
    assert regraft(clone, "train")[0] == 0
    assert manifests(clone)["train"] != before["train"]
    small_clone.set_params(clone, {"train": {"learning_rate": 1e-2}})
    code, _ = regraft(clone, "train")
    assert code == 0
    assert manifests(clone) == before


def test_a_second_batch_retrains_compares_with_the_champion_and_wins_on_the_new_action(
    through_flow: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    clone = copy(through_flow[0], tmp_path / "clone")
    base = manifests(clone)["model"]
    small_clone.second_batch(clone)
    code, outcome = regraft(clone, "retrain")
    assert (code, outcome["state"]) == (0, "promoted"), outcome
    assert manifests(clone)["model"] == base
    text = "\n".join(outcome["lines"])
    assert "action=repair" in text
    assert "better" in text
    assert regraft(clone, "status")[1]["champion"]["number"] == 2
    assert regraft(clone, "rollback")[0] == 0
    assert regraft(clone, "status")[1]["champion"]["number"] == 1
    assert regraft(clone, "retrain")[1]["state"] == "nothing to do", "a rollback is a person's word"


@pytest.mark.extended
def test_a_version_is_made_again_from_its_lineage_byte_for_byte_and_a_damaged_way_back_is_named(
    through_flow: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    clone = copy(through_flow[0], tmp_path / "clone")
    code, found = regraft(clone, "reproduce", "1", "--out", str(tmp_path / "again"))
    assert (code, found["state"], found["differs"]) == (0, "bit-equal", [])
    assert found["exact_match"]["registered"] == found["exact_match"]["rebuilt"] > 0.3
    assert manifests(tmp_path / "again") == manifests(clone)
    assert regraft(clone, "reproduce", "1", "--out", str(tmp_path / "again"))[0] == 2, "the folder exists"
    assert regraft(clone, "reproduce", "1", "--out", str(clone / "inside"))[0] == 2, "it would be in the clone"

    lineage = regraft(clone, "lineage", "1")[1]
    subprocess.run(["git", "update-ref", "-d", lineage["code"]["ref"]], cwd=clone, check=True)
    subprocess.run(["git", "reflog", "expire", "--expire=now", "--all"], cwd=clone, check=True)
    subprocess.run(["git", "gc", "-q", "--prune=now"], cwd=clone, check=True)
    code, found = regraft(clone, "reproduce", "1", "--out", str(tmp_path / "third"))
    assert code == 1
    assert lineage["code"]["ref"] in found["error"]["fix"]


@pytest.fixture(scope="module")
def undisturbed(through_dvc: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The train stage's manifest after a training that nothing disturbed, with another learning rate."""
    clone = copy(through_dvc, tmp_path_factory.mktemp("undisturbed") / "clone")
    small_clone.set_params(clone, {"train": {"learning_rate": 8e-3}})
    assert regraft(clone, "train")[0] == 0
    return manifests(clone)["train"]


@pytest.mark.parametrize("victim", ["stage", "dvc", "cli"])
def test_killed_in_the_middle_of_training_the_next_run_resumes_to_the_same_bytes(
    victim: str, through_dvc: Path, undisturbed: str, tmp_path: Path
) -> None:
    clone = copy(through_dvc, tmp_path / "clone")
    small_clone.set_params(clone, {"train": {"learning_rate": 8e-3}})
    command = subprocess.Popen([BIN / "regraft", "train"], cwd=clone, env=environment(clone), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: next(iter(clone.glob("data/work/checkpoints/*/step-*30")), None))
        stage = wait_for(lambda: next((p for p in trainers(clone)), None))
        dvc = next(parent for parent in stage.parents() if "dvc" in parent.cmdline())
        {"stage": stage, "dvc": dvc, "cli": psutil.Process(command.pid)}[victim].send_signal(signal.SIGKILL)
        if victim != "stage":
            wait_for(lambda: not trainers(clone))
    finally:
        command.wait(timeout=90)
    assert len(trainers(clone)) == 0
    done = subprocess.run(
        [BIN / "regraft", "train"], cwd=clone, env=environment(clone), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert manifests(clone)["train"] == undisturbed


def trainers(clone: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "regraft.train" in process.cmdline() and process.cwd() == str(clone) and "-m" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [p for p in found if Path(p.exe()).name.startswith("python")]


def wait_for(condition: Any, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")
