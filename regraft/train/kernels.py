"""`kernels: fused`: the same sums as PEFT's and transformers' own operations, in fewer and larger ones.

On a CPU (and wherever the base computes in fp32) an adapted layer multiplies once, by W₀ + s·BA, instead of three times
and two passes over its output; its backward pass takes the gradients of A and B through the rank. In 16 bits that sum
would round small updates away: there B's product is added to the base's output within its own multiplication, and the
layers that read one input share one copy of it (PEFT casts a 16-bit base's input to fp32 and back for each). On a GPU
Liger's kernels are used besides, where `liger-kernel` is installed (they were not run where this was written).
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
    """Replace what can be replaced in an adapted model, in place, and return the number of layers that were."""
    from regraft.model.adapter import lora_layers

    layers = lora_layers(model).values()
    folded = added = 0
    for layer in layers:
        if not _is_plain(layer):
            continue
        if _held_in(layer) in (torch.float32, torch.float64):
            layer.forward = MethodType(_folded, layer)
            folded += 1
        elif _held_in(layer) in (torch.bfloat16, torch.float16):
            layer.forward = MethodType(_added, layer)
            added += 1
    if torch.cuda.is_available():
        _use_liger(model)
    log.info("fused kernels: %d of %d adapted layers folded, %d added in 16 bits", folded, len(layers), added)
    return folded + added


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


class AddedLinear(torch.autograd.Function):
    """y = xWᵀ + b + s·(xAᵀ)Bᵀ in 16 bits, with gradients for x, A and B; A and B are held in fp32.

    Both sums are taken by the matrix products themselves: no term of (tokens, out) lies beside the output, none is
    rounded by itself, and none is passed over again. Kept are x, xAᵀ and the 16-bit A and B; a quantised W is made again
    in the backward pass. The gradients of A and B are scaled in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: Any, scale: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute y in `dtype` for x of (..., in), A of (rank, in) and B of (out, rank)."""
        ctx.wide = a.dtype
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        y: torch.Tensor = base(x)
        low = x.flatten(0, -2) @ a.T
        y.view(-1, y.shape[-1]).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, a, b, low)
        ctx.base, ctx.scale = base, scale
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients: ∂L/∂x = gW + s·(gB)A, ∂L/∂A = s·(gB)ᵀx, ∂L/∂B = s·gᵀ(xAᵀ)."""
        x, a, b, low = ctx.saved_tensors
        rows = g.flatten(0, -2)
        through = rows @ b
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (rows @ _weight(ctx.base)).addmm_(through, a, alpha=ctx.scale).view(x.shape)
        ga = (through.T @ x.flatten(0, -2)).to(ctx.wide)
        gb = (rows.T @ low).to(ctx.wide)
        return gx, ga.mul_(ctx.scale), gb.mul_(ctx.scale), None, None, None


def _folded(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's `Linear.forward`, folded while the trained adapter is the one in use and nothing is cast to 16 bits."""
    if torch.is_autocast_enabled(x.device.type) or not _in_use(self, args, kwargs):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return FoldedLinear.apply(x, a, b, self.base_layer, self.scaling["default"])  # type: ignore[no-any-return]


def _added(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's `Linear.forward` under autocast in the type that the base computes in."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype is not _held_in(self) or not x.numel() or not _in_use(self, args, kwargs):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    y: torch.Tensor = AddedLinear.apply(x, a, b, self.base_layer, self.scaling["default"], dtype)
    return y.to(x.dtype) if hasattr(self.base_layer.weight, "quant_state") else y  # as bitsandbytes' layers do


def _in_use(layer: Any, args: Any, kwargs: Any) -> bool:
    """Say whether a call means the trained adapter, alone and not merged; a reference may be switched on instead."""
    return layer.active_adapters == ["default"] and not (layer.disable_adapters or layer.merged or args or kwargs)


def _weight(base: Any) -> torch.Tensor:
    """The base's weight as (out, in), dequantised where it is held in 4 bits."""
    held: torch.Tensor = base.weight
    if not hasattr(held, "quant_state"):
        return held
    import bitsandbytes.functional

    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    return weight


def _held_in(layer: Any) -> torch.dtype:
    """The type that a layer's base is held in, or dequantised to."""
    weight: Any = layer.base_layer.weight
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else state.dtype  # type: ignore[no-any-return]


def _is_plain(layer: Any) -> bool:
    """Say whether a layer's adapter is A and B alone on a linear layer whose weights can be had as floats."""
    return (
        isinstance(layer.get_base_layer(), torch.nn.Linear)
        and not layer.use_dora["default"]
        and not layer.lora_bias["default"]
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and layer.get_base_layer().weight.dtype != torch.int8
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
