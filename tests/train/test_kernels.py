"""Folded layers give the sums of PEFT's own, in float64, and are used only where that is so."""

from pathlib import Path
from typing import Any

import pytest

from regraft.model.params import Quantization


def _adapted(base: Path, bits: int, **config: Any) -> Any:
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters, attach
    from regraft.model.load import load_model, open_base

    model = load_model(open_base(base), Quantization(bits=bits), training=True)
    if bits == 32:
        model = model.double()
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | config
    adapted = attach(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    for parameter in adapter_parameters(adapted).values():
        torch.nn.init.normal_(parameter, std=0.1)
        if bits == 32:
            parameter.data = parameter.data.double()
    return adapted


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-6), (4, 1e-4)])
def test_folded_layers_give_losses_and_gradients_of_peft(pinned: Path, bits: int, tolerance: float) -> None:
    import torch

    from regraft.model.adapter import adapter_parameters
    from regraft.train.data import collate
    from regraft.train.kernels import use_fused_kernels
    from regraft.train.loss import summed_loss

    row = {"input_ids": list(range(5, 29)), "labels": [-100, *range(6, 29)], "position_ids": [*range(10), *range(14)]}
    found = []
    for fused in (False, True):
        model = _adapted(pinned, bits)
        if fused:
            assert use_fused_kernels(model) == 4
        loss = summed_loss(model, collate([row, row], pad_id=0))
        loss.backward()
        found.append((loss.item(), {key: p.grad for key, p in adapter_parameters(model).items()}))

    assert found[1][0] == pytest.approx(found[0][0], rel=tolerance)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=10 * tolerance, atol=tolerance)


def test_the_gradients_of_a_folded_layer_pass_a_numerical_check() -> None:
    import torch

    from regraft.train.kernels import FoldedLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5).double().requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (5, 2)))

    assert torch.autograd.gradcheck(lambda *inputs: FoldedLinear.apply(*inputs, base, 1.5), (x, a, b))


@pytest.mark.parametrize(
    ("bits", "config"), [(32, {"use_dora": True}), (32, {"lora_dropout": 0.1}), (8, {}), (16, None)]
)
def test_what_a_fold_would_change_is_left_to_peft(pinned: Path, bits: int, config: dict[str, Any] | None) -> None:
    import torch

    from regraft.train.kernels import use_fused_kernels

    model = _adapted(pinned, bits, **config or {})
    if config is None:
        model = model.to(torch.bfloat16)
    assert use_fused_kernels(model) == 0


def test_a_run_with_fused_kernels_ends_near_one_without_and_repeats_to_the_byte(
    pinned: Path, dataset: Path, tmp_path: Path, params: Any
) -> None:
    from regraft.model.params import ModelParams
    from regraft.train.trainer import train

    reports = [
        train(
            params.model_copy(update={"dropout": 0.0, "kernels": kernels}),
            ModelParams(),
            base=pinned,
            dataset=dataset,
            out=tmp_path / name / "train",
            checkpoints=tmp_path / name / "checkpoints",
        )
        for name, kernels in (("one", "fused"), ("two", "fused"), ("plain", "plain"))
    ]
    assert reports[0].adapter_digest == reports[1].adapter_digest != reports[2].adapter_digest
    assert reports[0].loss_last == pytest.approx(reports[2].loss_last, rel=1e-4)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # inductor's
def test_compiled_blocks_train_as_the_others_do(pinned: Path, dataset: Path, tmp_path: Path, params: Any) -> None:
    from regraft.model.params import ModelParams
    from regraft.train.trainer import train

    reports = [
        train(
            params.model_copy(update={"dropout": 0.0, "compile": compiled}),
            ModelParams(quantization=Quantization(bits=32)),
            base=pinned,
            dataset=dataset,
            out=tmp_path / str(compiled) / "train",
            checkpoints=tmp_path / str(compiled) / "checkpoints",
        )
        for compiled in (False, True)
    ]
    assert reports[1].loss_last == pytest.approx(reports[0].loss_last, rel=1e-3)
    assert reports[1].loss_first == pytest.approx(reports[0].loss_first, rel=1e-4)


def test_what_liger_replaces_for_the_whole_process_is_put_back(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Liger, whose kernels need a GPU; what it replaces is Liger's own choice (`monkey_patch.py`)."""
    import transformers.integrations.liger
    from transformers.models.llama import modeling_llama

    from regraft.train import kernels

    norm, rotary = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb

    def replace(model: Any, settings: dict[str, bool]) -> None:
        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", object)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", len)

    monkeypatch.setattr(transformers.utils, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(transformers.integrations.liger, "apply_liger_kernel", replace)
    with pytest.raises(ValueError, match="in the middle"), kernels.own_kernels():
        kernels._use_liger(_adapted(pinned, 16))
        assert (modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb) == (object, len)
        raise ValueError("in the middle")

    assert (modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb) == (norm, rotary)
