"""Folded layers give the sums of PEFT's own, in float64, and are used only where that is so."""

from pathlib import Path
from typing import Any

import pytest

from regraft.model.params import Quantization


def _adapted(base: Path, bits: int, *, quantization: Quantization | None = None, **config: Any) -> Any:
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters, attach
    from regraft.model.load import load_model, open_base

    model = load_model(open_base(base), quantization or Quantization(bits=bits), training=True)
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


def test_the_gradients_of_an_added_layer_pass_a_numerical_check() -> None:
    import torch

    from regraft.train.kernels import AddedLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5).double().requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (5, 2)))

    def apply(*inputs: Any) -> Any:
        return AddedLinear.apply(*inputs, base, 1.5, torch.float64)

    assert torch.autograd.gradcheck(apply, (x, a, b))
    torch.testing.assert_close(apply(x, a, b), base(x) + 1.5 * (x @ a.T) @ b.T)


def _step(model: Any, *, autocast: bool) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of two packed blocks."""
    import torch

    from regraft.model.adapter import adapter_parameters
    from regraft.train.data import collate
    from regraft.train.loss import summed_loss

    row = {"input_ids": list(range(5, 29)), "labels": [-100, *range(6, 29)], "position_ids": [*range(10), *range(14)]}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = summed_loss(model, collate([row, row], pad_id=0))
    loss.backward()
    return loss.item(), {key: p.grad.clone() for key, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("bits", [16, 4])
def test_an_added_layer_is_at_least_as_near_to_the_exact_sums_as_pefts_in_bf16(pinned: Path, bits: int) -> None:
    import torch

    from regraft.model.adapter import lora_layers
    from regraft.train.kernels import _weight, use_fused_kernels

    model = _adapted(pinned, bits, quantization=Quantization(bits=bits, compute_dtype="bf16"))
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rows, inputs = 512, a.shape[1]
    x, g = torch.randn(2, rows, inputs).bfloat16(), torch.randn(2, rows, b.shape[0]).bfloat16()

    def run(forward: Any, *given: Any) -> list[Any]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        y = forward(*leaves)
        y.backward(g.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    weight = _weight(layer.base_layer).double()
    exact = run(lambda x, a, b: x @ weight.T + 2 * (x @ a.T) @ b.T, x.double(), a.double(), b.double())
    errors = []
    for fused in (False, True):
        if fused:
            assert use_fused_kernels(model) == 4
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a.grad = b.grad = None
            y, gx = run(layer, x)
        assert (y.dtype, gx.dtype, a.grad.dtype, b.grad.dtype) == (x.dtype, x.dtype, torch.float32, torch.float32)
        found = [y, gx, a.grad, b.grad]
        errors.append([float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)])
    assert all(own <= 1.001 * pefts < 0.01 for pefts, own in zip(*errors, strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("bits", [16, 4])
def test_a_bf16_step_of_added_layers_is_pefts_but_for_rounding_with_recomputed_activations_too(
    pinned: Path, bits: int
) -> None:
    from regraft.train.kernels import use_fused_kernels

    quantization = Quantization(bits=bits, compute_dtype="bf16")
    model = _adapted(pinned, bits, quantization=quantization, target_modules="all-linear")
    found = [_step(model, autocast=True)]
    assert use_fused_kernels(model) == 14
    found.append(_step(model, autocast=True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found.append(_step(model, autocast=True))

    (loss, gradients), (own_loss, own), (again_loss, again) = found
    assert own_loss == pytest.approx(loss, rel=2e-3)
    size = sum(each.square().sum() for each in gradients.values())
    assert float(sum((own[key] - gradients[key]).square().sum() for key in gradients) / size) ** 0.5 < 0.03
    assert again_loss == own_loss
    assert all(bool((again[key] == own[key]).all()) for key in own)


def test_a_base_in_fp32_is_not_folded_while_products_are_cast_to_16_bits(pinned: Path) -> None:
    from regraft.train.kernels import use_fused_kernels

    found = []
    for fused in (False, True):
        model = _adapted(pinned, 32).float()
        if fused:
            use_fused_kernels(model)
        found.append(_step(model, autocast=True))
    assert found[0][0] == found[1][0]
    assert all(bool((found[0][1][key] == found[1][1][key]).all()) for key in found[0][1])


def test_layers_that_read_one_input_keep_it_once(pinned: Path) -> None:
    import torch

    from regraft.train.kernels import use_fused_kernels

    kept = []
    for fused in (False, True):
        quantization = Quantization(bits=16, compute_dtype="bf16")
        model = _adapted(pinned, 16, quantization=quantization, target_modules="all-linear")
        if fused:
            use_fused_kernels(model)
        saved: dict[int, int] = {}

        def pack(tensor: Any, saved: dict[int, int] = saved) -> Any:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _step(model, autocast=True)
        kept.append(sum(saved.values()))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("bits", [32, 16])
def test_another_adapter_that_is_switched_on_or_none_is_what_a_fused_layer_computes(pinned: Path, bits: int) -> None:
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters
    from regraft.train.kernels import use_fused_kernels

    quantization = Quantization(bits=bits, compute_dtype="bf16" if bits == 16 else "auto")
    model = _adapted(pinned, bits, quantization=quantization)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model.add_adapter("ref", config)
    for parameter in adapter_parameters(model, "ref").values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(5, 29)[None]

    def logits() -> list[Any]:
        found = []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bits == 16):
            for name in ("default", "ref"):
                model.set_adapter(name)
                found.append(model(input_ids=ids).logits.float())
            with model.disable_adapter():
                found.append(model(input_ids=ids).logits.float())
        model.set_adapter("default")
        return found

    before = logits()
    assert use_fused_kernels(model) == 4
    after = logits()
    assert not torch.equal(before[0], before[1])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)
    assert float((after[0] - before[0]).norm()) < 0.02 * float(before[0].norm())


def test_the_gradients_of_a_folded_layer_pass_a_numerical_check() -> None:
    import torch

    from regraft.train.kernels import FoldedLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5).double().requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (5, 2)))

    assert torch.autograd.gradcheck(lambda *inputs: FoldedLinear.apply(*inputs, base, 1.5), (x, a, b))


@pytest.mark.parametrize(
    ("bits", "config"), [(32, {"use_dora": True}), (32, {"lora_dropout": 0.1}), (8, {}), (16, {"use_dora": True})]
)
def test_what_a_fold_would_change_is_left_to_peft(pinned: Path, bits: int, config: dict[str, Any] | None) -> None:
    from regraft.train.kernels import use_fused_kernels

    assert use_fused_kernels(_adapted(pinned, bits, **config)) == 0


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
