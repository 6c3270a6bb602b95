"""Every method and variant: trains a few steps on a tiny model, lowers the loss, saves, and comes back equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DamagedArtifact, ParamsError
from regraft.model.params import ModelParams, Quantization
from regraft.train.params import TrainParams
from regraft.train.report import TrainReport

STEPS = {"max_steps": 6, "batch_size": 4, "accumulation": 1, "dropout": 0.0, "learning_rate": 1e-2, "warmup": 0.0}
NF4, FP32 = Quantization(), Quantization(bits=32)
Train = Callable[..., tuple[Path, TrainReport]]


@pytest.fixture
def train(pinned: Path, dataset: Path, tmp_path: Path, params: TrainParams) -> Train:
    def _train(
        quantization: Quantization = FP32, base: Path = pinned, data: Path = dataset, name: str = "out", **changes: Any
    ) -> tuple[Path, TrainReport]:
        from regraft.train.trainer import train

        report = train(
            TrainParams.model_validate(params.model_dump() | STEPS | changes),
            ModelParams(quantization=quantization),
            base=base,
            dataset=data,
            out=tmp_path / name,
            checkpoints=tmp_path / f"{name}-checkpoints",
        )
        return tmp_path / name, report

    return _train


def _logits(base: Path, quantization: Quantization, adapter: Path | None) -> Any:
    """What the base says with an adapter loaded as evaluation loads it, through the check."""
    import torch

    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base

    model = load_model(open_base(base), quantization, training=False)
    if adapter is not None:
        model = load_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).repeat(2, 1)).logits


def _trained_logits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make `train` leave here what the model said at its end, before anything was saved."""
    import torch

    from regraft.train.adapt import Trainee

    said: list[Any] = []
    save = Trainee.save

    def spy(self: Trainee, *args: Any, **kwargs: Any) -> str:
        self.model.eval()
        with torch.no_grad():
            said.append(self.model(input_ids=torch.arange(3, 40).repeat(2, 1)).logits)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainee, "save", spy)
    return said


PAGED = ("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit")
EXTENDED = pytest.mark.extended


VARIANTS = [
    pytest.param({}, id="lora"),
    pytest.param({"dora": True}, id="dora"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"lora_plus": 16.0, "learning_rate": 2e-3}, id="lora+"),
    pytest.param({"init": "gaussian"}, id="gaussian"),
    pytest.param({"init": "orthogonal"}, id="orthogonal"),
    pytest.param({"init": "pissa"}, id="pissa"),
    pytest.param({"init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 8}}, id="pissa, rslora, ranks"),
    pytest.param({"init": "olora"}, id="olora"),
    pytest.param({"init": "eva"}, id="eva"),
    pytest.param({"rank_pattern": {"mlp.down_proj": 8}, "alpha_pattern": {".*layers.1.*q_proj": 4.0}}, id="patterns"),
    pytest.param({"modules_to_save": ["norm"]}, id="modules_to_save"),
    pytest.param({"modules_to_save": ["lm_head"]}, id="a tied output layer saved whole"),
    pytest.param({"trainable_tokens": ["<|im_start|>", "<|im_end|>"]}, id="trainable tokens, tied"),
    pytest.param({"dropout": 0.1, "gradient_checkpointing": True}, id="dropout, checkpointed activations"),
    pytest.param({"adapter_dtype": "bf16"}, id="saved in bf16"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_variant_lowers_the_loss_and_the_saved_adapter_says_what_the_trained_one_said(
    train: Train, pinned: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    said = _trained_logits(monkeypatch)
    out, report = train(**changes)

    assert report.loss_decreased
    assert report.zero_b == []
    assert (report.missing_modules, report.bare_weights) == ([], [])
    tolerance = 0.1 if changes.get("adapter_dtype") else 2e-4  # PiSSA's base was rounded once more
    loaded = _logits(pinned, FP32, out / "adapter")
    torch.testing.assert_close(loaded, said[0], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(loaded, _logits(pinned, FP32, None), atol=tolerance)


QUANTIZED = [
    pytest.param(Quantization(), {}, id="nf4, double"),
    pytest.param(Quantization(double_quant=False), {}, id="nf4"),
    pytest.param(Quantization(type="fp4"), {}, id="fp4, double"),
    pytest.param(Quantization(skip_modules=["down_proj"]), {}, id="nf4 but for a layer"),
    pytest.param(Quantization(bits=8), {}, id="int8"),
    pytest.param(Quantization(bits=8, int8_threshold=0.0), {}, id="int8 without outliers"),
    pytest.param(Quantization(bits=16, compute_dtype="bf16"), {}, id="bf16"),
    pytest.param(Quantization(), {"dora": True}, id="nf4, dora"),
    pytest.param(Quantization(), {"init": "loftq"}, id="nf4, loftq"),
    pytest.param(Quantization(), {"init": "eva"}, id="nf4, eva"),
    pytest.param(Quantization(), {"trainable_tokens": ["<|im_end|>"]}, id="nf4, trainable tokens"),
]


@pytest.mark.parametrize(("quantization", "changes"), QUANTIZED)
def test_a_quantised_base_trains_in_fp32_and_the_saved_adapter_says_what_the_trained_one_said(
    train: Train, pinned: Path, quantization: Quantization, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.train.adapt import Trainee

    said = _trained_logits(monkeypatch)
    seen: list[Any] = []
    monkeypatch.setattr(
        Trainee,
        "save",
        lambda self, *a, _save=Trainee.save, **k: (seen.append(self.parameters), _save(self, *a, **k))[1],
    )
    out, report = train(quantization, **changes)

    assert report.loss_decreased
    assert {p.dtype for p in seen[0].values()} == {torch.float32}
    expected = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} if quantization.skip_modules else set()
    assert set(report.unquantized_modules) == (expected | {"lm_head"} if quantization.bits < 16 else set())
    tolerance = 5e-2 if quantization.bits != 4 else 1e-5  # int8 and bf16 round activations, under autocast or not
    loaded = _logits(pinned, quantization, out / "adapter").float()
    torch.testing.assert_close(loaded, said[0].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_stays_unquantised_learns_the_same_in_16_bits_as_in_fp32(train: Train, bits: int) -> None:
    """Losses under autocast in bf16, whose rounding is 0.4 %; without a cast in between they would be equal."""
    losses = {}
    for kind in ("compute", "fp32"):
        how = Quantization(bits=bits, compute_dtype="bf16", unquantized=kind)
        out, report = train(how, name=kind, logging_every=1)
        assert report.loss_decreased
        losses[kind] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses["compute"] != losses["fp32"]
    assert losses["compute"] == pytest.approx(losses["fp32"], rel=0.02)


def test_logits_in_chunks_learn_the_same(train: Train) -> None:
    whole, first = train(logging_every=1)
    chunks, report = train(name="chunks", logits_chunk=16, logging_every=1)
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, chunks)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert report.params_digest != first.params_digest


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # they run, unpaged
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "lion_8bit",
        *(pytest.param(name, marks=EXTENDED) for name in PAGED),
    ],
)
def test_every_optimizer_lowers_the_loss_and_resumes_to_the_same_bytes(
    train: Train, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft import failpoints

    rate = {"learning_rate": 1e-3} if "lion" in optimizer else {}
    out, report = train(optimizer=optimizer, **rate)
    assert report.loss_decreased

    failpoints._passages.clear()
    monkeypatch.setenv("REGRAFT_FAILPOINT", "train.step@4=EIO")
    with pytest.raises(OSError, match="Input/output"):
        train(optimizer=optimizer, name="again", **rate)
    failpoints._passages.clear()
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    again, _ = train(optimizer=optimizer, name="again", **rate)
    assert (again / "adapter/adapter_model.safetensors").read_bytes() == (
        out / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "scheduler",
    [
        "cosine",
        "constant",
        pytest.param("linear", marks=EXTENDED),
        pytest.param("constant_with_warmup", marks=EXTENDED),
    ],
)
def test_a_scheduler_warms_up_and_ends_as_its_name_says(train: Train, scheduler: str) -> None:
    out, _ = train(scheduler=scheduler, warmup=0.34, logging_every=1, target_modules=["q_proj"])

    rates = [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    if scheduler == "constant":
        assert rates == [1e-2] * 6
    else:
        assert rates[0] < rates[1] < rates[2] <= 1e-2
        assert (rates[-1] < rates[3]) == (scheduler in ("cosine", "linear"))


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "pissa"},
        {"lora_plus": 8.0},
        pytest.param({"init": "eva"}, marks=EXTENDED),
        pytest.param({"dora": True}, marks=EXTENDED),
    ],
)
def test_a_variant_resumes_to_the_same_bytes(
    train: Train, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft import failpoints

    whole, _ = train(**changes)
    failpoints._passages.clear()
    monkeypatch.setenv("REGRAFT_FAILPOINT", "train.step@5=EIO")
    with pytest.raises(OSError, match="Input/output"):
        train(name="again", **changes)
    failpoints._passages.clear()
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    again, _ = train(name="again", **changes)

    assert {p.name: p.read_bytes() for p in (again / "adapter").iterdir()} == {
        p.name: p.read_bytes() for p in (whole / "adapter").iterdir()
    }


def test_loftq_starts_nearer_to_the_unquantised_base_than_its_quantised_weights_are(pinned: Path) -> None:
    import torch

    from regraft.model.adapter import attach
    from regraft.model.load import load_model, open_base
    from regraft.train.start import repair_quantization

    base = open_base(pinned)
    plain, quantized = _logits(pinned, FP32, None), _logits(pinned, NF4, None)
    from peft import LoraConfig

    config = LoraConfig(r=16, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach(load_model(base, NF4, training=False), config)
    repair_quantization(model, base.folder)
    with torch.no_grad():
        repaired = model(input_ids=torch.arange(3, 40).repeat(2, 1)).logits

    assert float((repaired - plain).norm()) < 0.8 * float((quantized - plain).norm())


def test_full_fine_tuning_lowers_the_loss_and_the_saved_model_says_what_the_trained_one_said(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    said = _trained_logits(monkeypatch)
    out, report = train(method="full", learning_rate=1e-3)

    assert report.loss_decreased
    assert (report.adapted_modules, report.trainable_parameters) == ([], report.total_parameters)
    loaded = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=torch.arange(3, 40).repeat(2, 1)).logits, said[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_prompt_tuning_wants_single_conversations_lowers_the_loss_and_comes_back_equal(
    train: Train, make_dataset: Callable[..., Path], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises(ParamsError, match="found prompt with packed blocks"):
        train(method="prompt")

    said = _trained_logits(monkeypatch)
    single = make_dataset(tmp_path / "single", block=1)
    out, report = train(data=single, method="prompt", learning_rate=5e-2, max_steps=20, prompt_tokens=8)
    assert report.loss_decreased
    assert report.trainable_parameters == 8 * 64
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), out / "prompt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=torch.arange(3, 40).repeat(2, 1)).logits, said[0])


def test_a_yardstick_is_refused_by_the_training_gate(train: Train) -> None:
    from regraft.gates.params import TrainingGate
    from regraft.gates.training import judge_training, read_metrics

    out, report = train(method="full", learning_rate=1e-3)
    verdict = judge_training(
        TrainingGate(), report, read_metrics(out / "metrics.jsonl"), adapter=report.adapter_digest, expected={}
    )

    assert not verdict.passed


def test_the_step_of_the_lowest_held_out_loss_is_kept(train: Train) -> None:
    """The rate is far too high, so that the loss rises again."""
    changes = {"validation_share": 0.2, "validate_every": 1, "learning_rate": 0.3, "logging_every": 10, "max_steps": 6}
    last, at_end = train(**changes)
    _, report = train(name="best", keep="best", **changes)

    losses = dict(report.held_out)
    assert report.held_out == at_end.held_out
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert report.kept_step == min(losses, key=lambda step: losses[step])
    assert report.kept_step != 6
    assert report.blocks == 8
    assert report.adapter_digest != at_end.adapter_digest
    lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in lines] == list(losses.values())


def test_early_stopping_ends_the_run_after_so_many_measurements_without_a_better_one(train: Train) -> None:
    changes = {"validation_share": 0.2, "validate_every": 1, "learning_rate": 0.3, "keep": "best", "max_steps": 30}
    _, report = train(early_stopping=2, scheduler="constant", **changes)

    assert report.stopped_early
    assert report.kept_step is not None
    assert report.steps == report.planned_steps == report.kept_step + 2 < 30


def test_a_run_that_stopped_early_is_finished_by_a_resume(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft import failpoints

    changes = {"validation_share": 0.2, "validate_every": 1, "learning_rate": 0.3, "keep": "best", "max_steps": 30}
    changes |= {"early_stopping": 2, "scheduler": "constant"}
    whole, _ = train(**changes)
    for at in ("train.step@3=EIO", "train.finish=EIO"):
        failpoints._passages.clear()
        monkeypatch.setenv("REGRAFT_FAILPOINT", at)
        with pytest.raises(OSError, match="Input/output"):
            train(name="again", **changes)
    failpoints._passages.clear()
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    again, _ = train(name="again", **changes)

    assert (again / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_warm_start_goes_on_from_the_parent_and_checks_that_it_is_the_one_meant(train: Train) -> None:
    parent, first = train()
    folder = str(parent / "adapter")
    _, warm = train(name="warm", parent=folder, parent_digest=first.adapter_digest)

    assert warm.parent == first.adapter_digest
    assert warm.loss_first < first.loss_first - 0.1
    with pytest.raises(DamagedArtifact, match=r"has the digest .* expected 0000"):
        train(name="other", parent=folder, parent_digest="0" * 64)
    with pytest.raises(ParamsError, match=r"train.rank: found 8, the parent has 4"):
        train(name="other", parent=folder, parent_digest=first.adapter_digest, rank=8)


@pytest.mark.parametrize(
    ("changes", "quantization", "words"),
    [
        ({"init": "pissa"}, NF4, "found pissa, which changes the base"),
        ({"init": "olora"}, Quantization(bits=8), "found olora"),
        ({"init": "loftq"}, FP32, "found loftq, expected it only with"),
        ({"method": "full"}, NF4, "found full, expected it only with"),
        ({"trainable_tokens": ["<new>"]}, FP32, r"'<new>' is no token .* its added tokens: <\|endoftext\|>"),
        ({"modules_to_save": ["head"]}, FP32, "train.modules_to_save: head names no module"),
        ({"target_modules": "all_linear"}, FP32, "did you mean `all-linear`"),
        ({"init": "pissa", "rank": 96}, FP32, "expected at most"),
    ],
)
def test_what_a_base_cannot_have_is_refused_in_the_words_of_its_parameter(
    train: Train, changes: dict[str, Any], quantization: Quantization, words: str
) -> None:
    with pytest.raises(ParamsError, match=words):
        train(quantization, **changes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_the_file_has_the_keys_that_peft_gives_an_adapter(train: Train, tiny_base: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out, report = train(dora=True, modules_to_save=["norm"], trainable_tokens=["<|im_end|>"], max_steps=1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), out / "adapter")

    assert "base_model.model.model.norm.weight" in report.trained_whole
    keys = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    assert keys == load_file(out / "adapter/adapter_model.safetensors").keys()
