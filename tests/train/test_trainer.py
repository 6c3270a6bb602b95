"""The stage as a function, in this process; `test_kill.py` kills it in others."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft import failpoints
from regraft.errors import ParamsError, Preempted, RegraftError, TrainingDiverged
from regraft.model.params import ModelParams, Quantization
from regraft.train.params import TrainParams
from regraft.train.report import TrainReport


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(pinned: Path, dataset: Path, tmp_path: Path, params: TrainParams) -> Callable[..., TrainReport]:
    def _run(name: str = "train", **changes: Any) -> TrainReport:
        from regraft.train.trainer import train

        model = changes.pop("model", ModelParams())
        data = changes.pop("dataset", dataset)
        return train(
            params.model_copy(update=changes),
            model,
            base=pinned,
            dataset=data,
            out=tmp_path / name,
            checkpoints=tmp_path / "checkpoints",
            measurements=tmp_path / "measurements.json",
        )

    return _run


@pytest.fixture(scope="module")
def undisturbed(
    pinned: Path, dataset: Path, params: TrainParams, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainReport]:
    from regraft.train.trainer import train

    folder = tmp_path_factory.mktemp("undisturbed")
    report = train(
        params, ModelParams(), base=pinned, dataset=dataset, out=folder / "train", checkpoints=folder / "checkpoints"
    )
    return folder / "train", report


def test_the_modules_of_a_model_are_not_walked_through_at_each_step(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    walked = {"train": 0, "zero_grad": 0}
    for name in walked:
        original = getattr(torch.nn.Module, name)

        def count(self: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            walked[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, name, count)
    seen = []
    for steps in (2, 4):
        walked.update(train=0, zero_grad=0)
        run(f"steps{steps}", max_steps=steps, epochs=None, checkpoint_every=99, dropout=0.0, seed=steps)
        seen.append((walked["train"] > 0, dict(walked)))
    assert seen[0] == seen[1]
    assert seen[0][0]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def _fail(at: str) -> None:
        failpoints._passages.clear()
        monkeypatch.setenv("REGRAFT_FAILPOINT", at)

    yield _fail
    failpoints._passages.clear()


def test_the_output_holds_adapter_metrics_report_and_manifest_only(undisturbed: tuple[Path, TrainReport]) -> None:
    assert sorted(_bytes(undisturbed[0])) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "report.json",
    ]


def test_the_report_states_what_the_training_gate_asks(undisturbed: tuple[Path, TrainReport]) -> None:
    folder, report = undisturbed

    assert report == TrainReport.load(folder / "report.json")
    assert (report.steps, report.planned_steps, report.blocks) == (6, 6, 10)
    assert report.all_finite
    assert report.loss_decreased == (report.loss_last < report.loss_first)
    assert report.loss_decreased
    assert len(report.expected_modules) == 14
    assert [module.name for module in report.adapted_modules] == report.expected_modules
    assert all(module.rank == 4 and module.a_norm > 0 and module.b_norm > 0 for module in report.adapted_modules)
    assert (report.missing_modules, report.zero_b, report.non_finite_parameters, report.non_finite_steps) == (
        [],
        [],
        [],
        [],
    )
    assert report.tokens_seen == 2 * report.tokens_trained


def test_metrics_have_one_line_for_each_logged_step(undisturbed: tuple[Path, TrainReport]) -> None:
    lines = [json.loads(line) for line in (undisturbed[0] / "metrics.jsonl").read_text().splitlines()]

    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(list(line) == ["step", "epoch", "loss", "grad_norm", "learning_rate"] for line in lines)
    assert lines[-1]["epoch"] == 2.0


def test_the_adapter_names_its_base_and_no_path(undisturbed: tuple[Path, TrainReport], tiny_base: Path) -> None:
    config = json.loads((undisturbed[0] / "adapter/adapter_config.json").read_text())

    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert str(tiny_base.parent) not in json.dumps(config)


def test_equal_inputs_give_equal_bytes(run: Callable[..., TrainReport], tmp_path: Path, undisturbed: Any) -> None:
    run()

    assert _bytes(tmp_path / "train") == _bytes(undisturbed[0])


@pytest.mark.parametrize(
    "at",
    [
        "train.step@1=EIO",
        "train.step@3=EIO",
        "train.checkpoint@2=EIO",
        "train.checkpointed@1=EIO",
        "train.step@4=TERM",
        "train.finish=EIO",
        "train.saved=EIO",
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bytes(
    run: Callable[..., TrainReport],
    fail: Callable[[str], None],
    undisturbed: tuple[Path, TrainReport],
    tmp_path: Path,
    at: str,
) -> None:
    fail(at)
    with pytest.raises(Preempted if at.endswith("TERM") else OSError):
        run()
    fail("")
    run()

    assert _bytes(tmp_path / "train") == _bytes(undisturbed[0])


def test_a_signal_stops_at_the_end_of_its_step_behind_a_checkpoint(
    run: Callable[..., TrainReport], fail: Callable[[str], None], tmp_path: Path
) -> None:
    fail("train.step@3=TERM")

    with pytest.raises(Preempted, match="stopped by SIGTERM after step 3 of 6"):
        run()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoints/*/step-*")) == ["step-000002", "step-000003"]
    assert not (tmp_path / "train").exists()


def test_a_damaged_newest_checkpoint_costs_steps_and_no_bytes(
    run: Callable[..., TrainReport],
    fail: Callable[[str], None],
    undisturbed: tuple[Path, TrainReport],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail("train.step@5=EIO")
    with pytest.raises(OSError, match="Input/output"):
        run()
    fail("")
    (newest,) = tmp_path.glob("checkpoints/*/step-000004")
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])

    with caplog.at_level(logging.INFO):
        run()

    assert "a damaged checkpoint is not used" in caplog.text
    assert "step-000002" in caplog.text
    assert _bytes(tmp_path / "train") == _bytes(undisturbed[0])


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_checkpoint(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import regraft.train.loop as loop

    calls = 0

    def poisoned(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = loop_loss(*arguments)
        return loss * float("nan") if calls == 6 else loss  # the last batch of the third step: 2, 1, 2, 1, ...

    loop_loss = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", poisoned)

    with pytest.raises(TrainingDiverged, match="at step 4 of 6 the loss was nan"):
        run(accumulation=2)
    assert [folder.name for folder in tmp_path.glob("checkpoints/*/step-*")] == ["step-000002"]
    assert not (tmp_path / "train").exists()


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_fine(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    import regraft.train.loop as loop

    real = loop.summed_loss

    def infinite_gradient(*arguments: Any) -> Any:
        loss = real(*arguments)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(loop, "summed_loss", infinite_gradient)

    with pytest.raises(TrainingDiverged, match=r"at step 1 of 6 the loss was [0-9.]+ and the gradient norm (nan|inf)"):
        run()


def test_memory_running_out_names_the_settings_to_change(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    import regraft.train.loop as loop

    def exhausted(*arguments: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop, "summed_loss", exhausted)

    with pytest.raises(RegraftError, match="out of memory on the cpu with batch_size 2") as failure:
        run()
    assert "train.batch_size to 1 and train.accumulation to 4" in str(failure.value.fix)


def test_a_full_disk_at_a_checkpoint_is_said_in_plain_words(
    run: Callable[..., TrainReport], fail: Callable[[str], None], tmp_path: Path
) -> None:
    fail("commit_dir.manifest@2=ENOSPC")

    with pytest.raises(RegraftError, match="is full"):
        run()
    assert [folder.name for folder in tmp_path.glob("checkpoints/*/step-*")] == ["step-000002"]


def test_a_misspelt_target_module_names_those_that_there_are(run: Callable[..., TrainReport]) -> None:
    with pytest.raises(ParamsError, match=r"qproj names no linear layer; this base has down_proj, .*, q_proj"):
        run(target_modules=["qproj", "v_proj"])


def test_a_list_of_target_modules_adapts_those_only(run: Callable[..., TrainReport]) -> None:
    report = run(target_modules=["q_proj"], max_steps=1, accumulation=1)

    assert report.expected_modules == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert [module.name for module in report.adapted_modules] == report.expected_modules


@pytest.mark.parametrize("bits", [8, 16])
def test_other_widths_train_with_checkpointed_activations_too(run: Callable[..., TrainReport], bits: int) -> None:
    report = run(model=ModelParams(quantization=Quantization(bits=bits)), max_steps=2, gradient_checkpointing=True)

    assert report.all_finite
    assert report.zero_b == []


def test_one_batch_of_four_equals_two_accumulated_batches_of_two(
    run: Callable[..., TrainReport], make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_dataset(tmp_path / "data", count=16)
    settings = {
        "dataset": data,
        "max_steps": 1,
        "dropout": 0.0,
        "model": ModelParams(quantization=Quantization(bits=16)),
    }

    whole = run("whole", batch_size=4, accumulation=1, **settings)
    halves = run("halves", batch_size=2, accumulation=2, **settings)

    assert whole.tokens_trained == halves.tokens_trained
    assert halves.loss_first == pytest.approx(whole.loss_first, rel=1e-6)
    assert halves.grad_norm_largest == pytest.approx(whole.grad_norm_largest, rel=1e-5)


def test_whoever_follows_the_run_finds_its_live_metrics(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    run()

    current = json.loads((tmp_path / "checkpoints/current.json").read_text())
    assert Path(current["metrics"]).read_bytes() == (tmp_path / "train/metrics.jsonl").read_bytes()
    assert Path(current["metrics"]).parent.name == current["key"][:16]


def test_measurements_are_written_where_asked_and_nowhere_else(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    run()

    measured = json.loads((tmp_path / "measurements.json").read_text())
    assert measured["device"] == "cpu"
    assert measured["threads"] == 1
    assert measured["tokens_per_second"] >= measured["useful_tokens_per_second"] > 0


def test_torch_is_left_as_it_was_found(run: Callable[..., TrainReport]) -> None:
    import torch

    torch.set_num_threads(2)
    run(max_steps=1)

    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
