"""What is said about speed: counted exactly, and never part of what a training gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from regraft.train.loop import Progress
from regraft.train.speed import PEAKS, Speed, flops_per_token, peak_flops


def test_operations_of_a_token_are_four_for_a_frozen_weight_and_six_for_a_trained_one(pinned: Path) -> None:
    from peft import LoraConfig

    from regraft.model.adapter import attach
    from regraft.model.load import load_model, open_base
    from regraft.model.params import Quantization

    model: Any = load_model(open_base(pinned), Quantization(), training=True)
    frozen = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two blocks: q and o, k and v, the gated layers
    assert flops_per_token(model, 0, full=False) == 4 * frozen
    assert flops_per_token(model, 0, full=True) == 6 * frozen
    adapted = attach(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert flops_per_token(adapted, 1000, full=False) == 4 * frozen + 6000


def test_a_line_of_the_live_speed_covers_the_steps_since_the_line_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("regraft.train.speed.time.monotonic", lambda: next(clock))
    speed, progress = Speed(100.0), Progress()
    assert speed.note(tmp_path / "speed.jsonl", 5, progress) == ""
    progress.computed, progress.seen = 4000, 3000

    assert speed.note(tmp_path / "speed.jsonl", 10, progress) == ", 1,500 tokens/s"
    (line,) = map(json.loads, (tmp_path / "speed.jsonl").read_text().splitlines())
    assert (line["step"], line["tokens_per_second"], line["useful_tokens_per_second"]) == (10, 2000.0, 1500.0)
    assert line["flops_per_second"] == 150_000
    assert line["peak_memory_mb"] > 100


def test_the_share_of_the_peak_is_of_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, part in (("NVIDIA H200", "H200"), ("NVIDIA L40S", "L40"), ("NVIDIA L4", "L4"), ("Tesla T4", "T4")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops() == PEAKS[part]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 970")
    assert peak_flops() is None
