"""The equations of the papers against what the adapted layers compute, in float64."""

import math
from typing import Any

import pytest

RANK, ALPHA, OUT, IN = 4, 12, 24, 40


@pytest.fixture
def layer() -> Any:
    """A function that adapts one linear layer of random weights and returns PEFT's layer, B random too."""
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import attach

    def _layer(b: bool = True, **config: Any) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=True)).double()
        adapted = attach(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **config)).double()
        found = adapted.base_model.model[0]
        if b:
            torch.nn.init.normal_(found.lora_B["default"].weight)
        return found

    return _layer


def _parts(layer: Any) -> tuple[Any, Any, Any, Any]:
    return (
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    )


@pytest.mark.parametrize(("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / math.sqrt(RANK))])
def test_lora_adds_the_scaled_product_and_its_gradients_are_those_of_the_paper(
    layer: Any, rslora: bool, scale: float
) -> None:
    """h = W₀x + b + s·BAx; ∂L/∂B = s·g(Ax)ᵀ, ∂L/∂A = s·Bᵀgxᵀ; s = alpha/r or alpha/√r (arXiv:2106.09685, 2312.03732)."""
    import torch

    adapted = layer(use_rslora=rslora)
    w, bias, a, b = _parts(adapted)
    x, g = torch.randn(7, IN, dtype=torch.float64), torch.randn(7, OUT, dtype=torch.float64)

    h = adapted(x)
    h.backward(g)

    torch.testing.assert_close(h, x @ w.T + bias + scale * (x @ a.T) @ b.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.grad, scale * g.T @ (x @ a.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, scale * b.T @ g.T @ x, rtol=1e-12, atol=1e-12)
    assert w.grad is None


def test_dora_scales_each_row_to_its_learned_length(layer: Any) -> None:
    """W' = m · (W₀ + s·BA) / ‖W₀ + s·BA‖ by rows; m begins at ‖W₀‖ (arXiv:2402.09353)."""
    import torch

    adapted = layer(use_dora=True)
    w, bias, a, b = _parts(adapted)
    m = adapted.lora_magnitude_vector["default"].weight
    assert torch.allclose(m, w.norm(dim=1))
    torch.nn.init.uniform_(m, 0.5, 2.0)
    x = torch.randn(7, IN, dtype=torch.float64)
    v = w + ALPHA / RANK * b @ a

    torch.testing.assert_close(adapted(x), x @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T + bias)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"use_rslora": True},
        {"use_dora": True},
    ],
)
def test_a_fresh_adapter_leaves_the_output_as_it_was(layer: Any, config: dict[str, Any]) -> None:
    import torch

    adapted = layer(b=False, **config)
    x = torch.randn(7, IN, dtype=torch.float64)

    torch.testing.assert_close(adapted(x), adapted.base_layer(x), rtol=1e-12, atol=1e-6 if config else 0)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merging_keeps_the_output_and_unmerging_brings_the_weights_back(layer: Any, config: dict[str, Any]) -> None:
    import torch

    adapted = layer(**config)
    x = torch.randn(7, IN, dtype=torch.float64)
    with torch.no_grad():
        before, weights = adapted(x), adapted.base_layer.weight.clone()
        adapted.merge()
        torch.testing.assert_close(
            torch.nn.functional.linear(x, adapted.base_layer.weight, adapted.base_layer.bias), before
        )
        adapted.unmerge()

    torch.testing.assert_close(adapted.base_layer.weight, weights, rtol=1e-12, atol=1e-12)


def test_an_adapter_has_rank_times_both_widths_parameters(layer: Any) -> None:
    adapted = layer()
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == RANK * (OUT + IN)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_a_start_taken_out_of_the_base_leaves_the_output_and_saves_as_a_plain_adapter(
    kind: str, rslora: bool, conv: bool, tmp_path: Any
) -> None:
    """W₀ - s·B₀A₀ + s·BA, saved for W₀ as s·[B, -B₀][A; A₀]."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers.pytorch_utils import Conv1D

    from regraft.artifacts import read_json
    from regraft.model.adapter import adapter_parameters, attach
    from regraft.train.start import take_start

    torch.manual_seed(0)
    model = torch.nn.Sequential(Conv1D(OUT, IN) if conv else torch.nn.Linear(IN, OUT, bias=False))
    matrix = model[0].weight.T if conv else model[0].weight
    original, x = matrix.detach().clone(), torch.randn(7, IN)
    before = model(x).detach()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_rslora=rslora, fan_in_fan_out=conv)
    adapted = attach(model, config)

    start = take_start(adapted, kind)
    torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)
    if kind == "pissa":  # the principal part is what went out: what is left is Eckart-Young's error
        left = adapted.base_model.model[0].base_layer.weight
        expected = torch.linalg.svdvals(original)[RANK:].norm()
        torch.testing.assert_close(left.norm(), expected, rtol=1e-4, atol=1e-5)

    for parameter in adapter_parameters(adapted).values():
        torch.nn.init.normal_(parameter)
    after = adapted(x).detach()
    start.save(adapted, tmp_path / "adapter", base_name="base", dtype="fp32")
    saved, settings = (
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
        read_json(tmp_path / "adapter/adapter_config.json"),
    )
    a, b = (saved[f"base_model.model.0.lora_{half}.weight"] for half in "AB")
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings["use_rslora"] else alpha / rank
    bias = model[0].base_layer.bias if conv else 0
    assert rank == 2 * RANK
    torch.testing.assert_close(x @ (original + scale * b @ a).T + bias, after, rtol=1e-4, atol=1e-4)


def test_lora_plus_gives_b_its_multiple_of_the_rate(tmp_path: Any) -> None:
    """η_B = λ·η_A (arXiv:2402.12354), and nothing else changes hands."""
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters, attach
    from regraft.train.loop import AdapterTrainer

    model = attach(torch.nn.Sequential(torch.nn.Linear(IN, OUT)), LoraConfig(r=RANK, target_modules=["0"]))

    class Bare(AdapterTrainer):
        def __init__(self) -> None:
            from types import SimpleNamespace

            from transformers import TrainingArguments

            self.args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, report_to="none")
            self.optimizer = self.optimizer_cls_and_kwargs = None
            self.model = model
            self.params = SimpleNamespace(lora_plus=16.0)
            self.trainee = SimpleNamespace(parameters=adapter_parameters(model))

    groups = Bare().create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    parameters = adapter_parameters(model)
    assert {key.split(".")[-2]: rates[id(p)] for key, p in parameters.items()} == {
        "lora_A": pytest.approx(1e-3),
        "lora_B": pytest.approx(1.6e-2),
    }
    assert len(rates) == 2
