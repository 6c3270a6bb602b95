"""Two processes on a CPU train what one does on the same blocks a step; a signal and a failure reach the starter."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from regraft.errors import Exit, RegraftError
from regraft.model.params import ModelParams, Quantization
from regraft.train import crew
from regraft.train.params import TrainParams

ROOT = Path(__file__).parent.parent.parent
NF4 = ModelParams()
ALONE = TrainParams(
    max_steps=6, batch_size=4, rank=4, alpha=8, learning_rate=5e-3, warmup=0.2, logging_every=1, checkpoint_every=2,
    threads=1,
)  # fmt: skip
TOGETHER = ALONE.model_copy(update={"processes": 2, "batch_size": 2})
SHARED = TOGETHER.model_copy(update={"sharding": "full"})


def clone(folder: Path, pinned: Path, dataset: Path, params: TrainParams, model: ModelParams = NF4) -> Path:
    """A folder in which the stage `train` can run."""
    from ruamel.yaml import YAML

    work = folder / "data/work"
    shutil.copytree(pinned, work / "model")
    shutil.copytree(dataset, work / "preprocess")
    content = {"model": model.model_dump(mode="json"), "train": params.model_dump(mode="json")}
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(content, file)
    return folder


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Path]) -> Path:
    """A training set of as many blocks as fill every step: what is left over is shared out by repeating blocks."""
    from regraft.train.data import open_blocks

    folder = tmp_path_factory.mktemp("even")
    made = (make_dataset(folder / str(count), count=count) for count in range(40, 90))
    return next(each for each in made if len(open_blocks(each).rows) % 4 == 0)


def start(folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "regraft.train"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(running: "subprocess.Popen[str]") -> int:
    """Wait for the end and return the exit code."""
    running.communicate(timeout=300)
    return running.returncode


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def preempt(folder: Path) -> None:
    """Start the stage and send it SIGTERM once it has a checkpoint."""
    running = start(folder)
    deadline = time.monotonic() + 200
    while not list((folder / "data/work/checkpoints").glob("*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=100)
    assert running.returncode == Exit.PREEMPTED, said


@pytest.mark.slow
def test_two_processes_make_the_steps_that_one_makes_of_the_same_blocks(
    tmp_path: Path, pinned: Path, even: Path
) -> None:
    from regraft.train.trainer import train

    report = train(
        ALONE, ModelParams(), base=pinned, dataset=even, out=tmp_path / "alone", checkpoints=tmp_path / "checkpoints"
    )
    folder = clone(tmp_path / "clone", pinned, even, TOGETHER)
    running = start(folder)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    out = folder / "data/work/train"
    together = json.loads((out / "report.json").read_text())
    assert (together["steps"], together["tokens_seen"]) == (report.steps, report.tokens_seen)
    assert together["tokens_trained"] == report.tokens_trained
    first, *later = zip(lines(tmp_path / "alone"), lines(out), strict=True)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert first[1][key] == pytest.approx(first[0][key], rel=1e-5)
    for one, two in later:  # Adam's first steps are nearly signs: rounding in another order is enlarged
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    ours = load_file(tmp_path / "alone/adapter/adapter_model.safetensors")
    theirs = load_file(out / "adapter/adapter_model.safetensors")
    for name, tensor in ours.items():
        assert float((theirs[name] - tensor).norm()) <= 5e-2 * float(tensor.norm())
    newest = max((folder / "data/work/checkpoints").glob("*/step-*"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_two_processes_that_share_the_base_out_make_the_steps_of_one_that_has_it_whole(
    tmp_path: Path, pinned: Path, even: Path, bits: int
) -> None:
    """FSDP2 on gloo; the same for NF4, whose weights are then stored as floats."""
    from regraft.train.trainer import train

    model = ModelParams(quantization=Quantization(bits=bits))
    train(ALONE, model, base=pinned, dataset=even, out=tmp_path / "alone", checkpoints=tmp_path / "checkpoints")
    folder = clone(tmp_path / "clone", pinned, even, SHARED, model)
    running = start(folder)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    out = folder / "data/work/train"
    for one, two in zip(lines(tmp_path / "alone"), lines(out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    ours = load_file(tmp_path / "alone/adapter/adapter_model.safetensors")
    theirs = load_file(out / "adapter/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert float((theirs[name] - tensor).norm()) <= 5e-2 * float(tensor.norm())
    report = json.loads((out / "report.json").read_text())
    assert (report["zero_b"], report["missing_modules"], report["all_finite"]) == ([], [], True)


@pytest.mark.extended
def test_a_shared_out_training_that_is_stopped_ends_as_if_undisturbed(
    tmp_path: Path, pinned: Path, dataset: Path
) -> None:
    changes = {"max_steps": 60, "checkpoint_every": 10, "gradient_checkpointing": True}
    params = SHARED.model_copy(update={**changes, "validation_share": 0.2, "validate_every": 20, "keep": "best"})
    whole = clone(tmp_path / "whole", pinned, dataset, params)
    assert ended(start(whole)) == 0
    folder = clone(tmp_path / "stopped", pinned, dataset, params)
    preempt(folder)
    assert ended(start(folder)) == 0
    adapters = [each / "data/work/train/adapter/adapter_model.safetensors" for each in (whole, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_base_that_was_not_shared_out_is_refused(tiny_base: Path) -> None:
    """accelerate drops its plugin on a CPU: without this, copies of the whole base would pass for shares."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from regraft.model.adapter import adapter_parameters, attach
    from regraft.train.shard import follow_shards

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    with pytest.raises(RegraftError, match="layers were not shared out one by one"):
        follow_shards(model, adapter_parameters(model))


@pytest.mark.parametrize(
    "changes",
    [{"processes": 1}, {"dora": True}, {"init": "pissa"}, {"optimizer": "paged_adamw_8bit"}, {"kernels": "fused"}],
)
def test_what_was_not_tried_with_a_shared_out_base_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="for `sharding: full`"):
        TrainParams.model_validate(SHARED.model_dump() | changes)


@pytest.mark.extended
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_two_processes_learn_from_preferences_as_one_does(
    tmp_path: Path,
    pinned: Path,
    objective: str,
    make_preferences: Callable[..., Any],
    write_preferences: Callable[..., Path],
) -> None:
    from regraft.train.trainer import train

    data = write_preferences(tmp_path / "preprocess", make_preferences(24))
    alone = ALONE.model_copy(update={"objective": objective, "scheduler": "constant"})
    report = train(
        alone, ModelParams(), base=pinned, dataset=data, out=tmp_path / "alone", checkpoints=tmp_path / "checkpoints"
    )
    folder = clone(
        tmp_path / "clone", pinned, data, alone.model_copy(update={"processes": 2, "batch_size": ALONE.batch_size // 2})
    )
    running = start(folder)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    out = folder / "data/work/train"
    together = json.loads((out / "report.json").read_text())
    assert (together["tokens_seen"], together["tokens_trained"]) == (report.tokens_seen, report.tokens_trained)
    for one, two in zip(lines(tmp_path / "alone"), lines(out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert two["reward_margin"] == pytest.approx(one["reward_margin"], rel=5e-2, abs=1e-4)


@pytest.mark.extended
def test_a_signal_ends_both_after_a_checkpoint_and_the_next_run_ends_as_if_undisturbed(
    tmp_path: Path, pinned: Path, dataset: Path
) -> None:
    params = TOGETHER.model_copy(update={"max_steps": 60, "dropout": 0.1, "checkpoint_every": 10})
    whole = clone(tmp_path / "whole", pinned, dataset, params)
    assert ended(start(whole)) == 0
    folder = clone(tmp_path / "stopped", pinned, dataset, params)
    preempt(folder)
    assert not (folder / "data/work/train").exists()
    assert ended(start(folder)) == 0
    adapters = [each / "data/work/train/adapter/adapter_model.safetensors" for each in (whole, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.extended
def test_what_a_member_refuses_comes_out_of_the_stage_in_its_own_words(
    tmp_path: Path, pinned: Path, dataset: Path
) -> None:
    folder = clone(tmp_path, pinned, dataset, TOGETHER.model_copy(update={"target_modules": ["w_proj"]}))
    running = start(folder)
    said, _ = running.communicate(timeout=200)
    assert running.returncode == Exit.USAGE, said
    outcome = json.loads((folder / "data/work/outcomes/train.json").read_text())
    assert "train.target_modules: w_proj names no linear layer" in outcome["error"]["message"]


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", "4")  # of somebody else's launcher: only torchrun started by a stage counts
    assert (crew.size(), crew.is_first()) == (1, True)
    assert crew.from_all("x") == ["x"]
    assert crew.told_by_first(3) == 3
    assert crew.summed(torch.ones(2)).tolist() == [1, 1]


def test_a_step_of_more_processes_takes_more_blocks() -> None:
    from regraft.train.trainer import planned_steps

    epochs = TrainParams(epochs=2, batch_size=4, accumulation=2)
    assert planned_steps(epochs, 100) == 26
    assert planned_steps(epochs.model_copy(update={"processes": 2}), 100) == 14
