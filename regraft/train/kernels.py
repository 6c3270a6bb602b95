"""`kernels: fused`: the same sums as PEFT's and transformers' own operations, in fewer and larger ones.

On a CPU (and wherever the base computes in fp32) an adapted layer multiplies once, by W₀ + s·BA, instead of three times
and two passes over its output; its backward pass takes the gradients of A and B through the rank. In 16 bits that sum
would round small updates away, so there PEFT's own operations stay, and Liger's kernels are used where `liger-kernel`
is installed (its Triton kernels need a GPU: they were not run where this was written).
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch

log = logging.getLogger("regraft.train")
_replaced: list[tuple[ModuleType, str, Any]] = []


@contextmanager
def own_kernels() -> Iterator[None]:
    """Put back what Liger replaced: classes and functions of transformers' modules, for every model of the process."""
    try:
        yield
    finally:
        while _replaced:
            module, name, value = _replaced.pop()
            setattr(module, name, value)


def use_fused_kernels(model: Any) -> int:
    """Replace what can be replaced in an adapted model, in place, and return the number of layers that were folded."""
    from regraft.model.adapter import lora_layers

    folded = 0
    for layer in lora_layers(model).values():
        if _can_fold(layer):
            layer.forward = MethodType(_forward, layer)
            folded += 1
    if torch.cuda.is_available():
        _use_liger(model)
    log.info("fused kernels: %d of %d adapted layers folded", folded, len(lora_layers(model)))
    return folded


def compile_blocks(model: Any) -> int:
    """Compile each transformer block by itself, in place, and return their number.

    Not the whole model: the loss puts a hook on the output layer for each batch, and compiled code would go on with the
    first one's (torch does not guard on hooks).
    """
    names = set(model.get_base_model()._no_split_modules or ()) if hasattr(model, "get_base_model") else set()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        block.compile(dynamic=True)
    if not blocks:
        log.warning("train.compile: this model does not name its blocks; it is not compiled")
    return len(blocks)


class FoldedLinear(torch.autograd.Function):
    """y = x(W + s·BA)ᵀ + b, with gradients for x, A and B.

    ∂L/∂x = g(W + s·BA); ∂L/∂A = s·(gB)ᵀx; ∂L/∂B = s·gᵀ(xAᵀ). The folded weight is made again in the backward pass, in
    r·out·in operations, so that no second copy of the base is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: Any, scale: float) -> torch.Tensor:
        """Compute y for x of (..., in), A of (rank, in) and B of (out, rank)."""
        ctx.save_for_backward(x, a, b)
        ctx.base, ctx.scale = base, scale
        return torch.nn.functional.linear(x, torch.addmm(_weight(base), b, a, alpha=scale), base.bias)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients."""
        x, a, b = ctx.saved_tensors
        rows, inputs = g.flatten(0, -2), x.flatten(0, -2)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = g @ torch.addmm(_weight(ctx.base), b, a, alpha=ctx.scale)
        ga = (rows @ b).T @ inputs
        gb = rows.T @ (inputs @ a.T)
        return gx, ga.mul_(ctx.scale), gb.mul_(ctx.scale), None, None


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's `Linear.forward` for one active adapter that is not merged."""
    if self.disable_adapters:
        return self.base_layer(x)  # type: ignore[no-any-return]
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return FoldedLinear.apply(x, a, b, self.base_layer, self.scaling["default"])  # type: ignore[no-any-return]


def _weight(base: Any) -> torch.Tensor:
    """The base's weight in fp32 as (out, in), dequantised where it is held in 4 bits."""
    held: torch.Tensor = base.weight
    if not hasattr(held, "quant_state"):
        return held
    import bitsandbytes.functional

    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    return weight


def _can_fold(layer: Any) -> bool:
    base, weight = layer.get_base_layer(), layer.get_base_layer().weight
    exact = (
        weight.quant_state.dtype if hasattr(weight, "quant_state") and weight.quant_state is not None else weight.dtype
    )
    return (
        isinstance(base, torch.nn.Linear)
        and exact in (torch.float32, torch.float64)
        and not layer.use_dora["default"]
        and not layer.lora_bias["default"]
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and weight.dtype != torch.int8
    )


def _use_liger(model: Any) -> None:
    """Norms, rotary embeddings and gated layers by Liger (arXiv:2410.10989); the loss has its own short logits."""
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        log.info("liger-kernel is not installed: transformers' own norms and gates are used")
        return
    from transformers.integrations.liger import apply_liger_kernel

    module = sys.modules[type(model.get_base_model()).__module__]
    before = dict(vars(module))
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    _replaced.extend((module, name, value) for name, value in before.items() if vars(module)[name] is not value)
