"""The benchmarks for a GPU: dry runs at tiny size anywhere, short forms on a card."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from regraft.plan.architecture import architecture
from regraft.plan.memory import predict
from regraft.plan.setup import Setup

FOLDER = Path(__file__).parent.parent.parent / "bench/gpu"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own; a benchmark shows what it shows


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> Any:
    sys.modules.pop(name, None)
    return importlib.import_module(name)


LONGER = [pytest.param(name, marks=pytest.mark.extended) for name in ("throughput", "memory", "noise_band", "sharded")]


@pytest.mark.parametrize("name", ["plan_accuracy", *LONGER])
def test_a_dry_run_writes_its_report_and_claims_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    told = script(name).main(["--tiny"])
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(told))
    assert (written["dry_run"], written["goals"]) == (True, [])
    assert set(written) >= {"figures", "goals", "hardware", "versions", "date"}
    assert "a dry run, nothing about a GPU is measured" in capsys.readouterr().out


def test_one_repeated_batch_is_learnt_in_the_dry_run(tmp_path: Path) -> None:
    figures = script("memory").main(["--tiny", "--out", str(tmp_path)])["figures"]["tiny"]
    assert (figures["length"], figures["too_long"]) == (64, [])
    assert figures["losses"][-1] < figures["losses"][0]  # one batch, again and again


@pytest.mark.extended
def test_equal_runs_are_equal_on_a_cpu_and_seeds_differ(tmp_path: Path) -> None:
    figures = script("noise_band").main(["--tiny", "--out", str(tmp_path)])["figures"]
    assert figures["bits_equal"]
    assert figures["five_seeds"]["adapter_norm_deviation"] > 0


def test_a_made_base_holds_the_bytes_that_the_plan_says() -> None:
    harness = script("harness")
    shape = harness.SHAPES["tiny"]
    model = harness.make_model(shape, 4, attention="sdpa")
    packed = [m for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    states = [m.weight.quant_state for m in packed]
    tensors = [m.weight for m in packed]
    tensors += [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    held = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    assert held == predict(architecture(shape), Setup()).base
    rest = sum(p.numel() for p in model.parameters() if not any(p is m.weight for m in packed))
    assert 2 * rest == predict(architecture(shape), Setup()).unquantized


def test_the_shapes_are_the_sizes_that_they_are_named_after() -> None:
    sizes = {name: architecture(shape).parameters for name, shape in script("harness").SHAPES.items()}
    assert sizes["8b"] == 8_030_261_248
    assert sizes["1b"] == 1_235_814_400
    assert 65e9 < sizes["65b"] < 66e9
    assert 2.4e9 < sizes["exaone-2.4b"] < 2.41e9


@pytest.mark.gpu
def test_on_a_card_the_plan_is_within_a_tenth_of_what_torch_holds() -> None:
    accuracy = script("plan_accuracy")
    for case in (("1b", 4, 2, 1024, False), ("1b", 16, 4, 1024, True)):
        assert accuracy.measure(case, "sdpa", 3)["ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.gpu
def test_on_a_card_a_cap_is_kept_and_the_loss_falls() -> None:
    found = script("memory").longest("1b", 6e9 / 2**30, (512,), steps=6)
    assert found["length"] == 512
    assert found["reserved_mib"] < 6e9 / 2**20
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.gpu
def test_on_a_card_our_trainer_is_timed(tmp_path: Path) -> None:
    figures = script("throughput").main(["--shape", "1b", "--steps", "5", "--rounds", "1", "--out", str(tmp_path)])
    assert figures["figures"]["qlora"]["ours"]["tokens_per_second"] > 0


@pytest.mark.gpu
def test_on_two_cards_a_shared_out_4_bit_base_trains_as_a_whole_one(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = ["--shape", "1b", "--steps", "5", "--length", "512", "--alone", "--out", str(tmp_path)]
    figures = script("sharded").main(arguments)["figures"]
    assert figures["largest_difference"] < 0.01
    assert figures["shared"]["peak_gpu_memory_mb"] < figures["alone"]["peak_gpu_memory_mb"]
