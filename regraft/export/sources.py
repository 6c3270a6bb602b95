"""The base that an adapter saw while it was trained: each linear layer quantised as in training, and back.

An adapter trained on a quantised base has also learnt to make up for the quantisation's error. Whether it is then
better merged into the original weights or into these is disputed (peft #2105, #2321; unsloth-zoo #810), so both are
candidates and the verification measures.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from regraft.export.base import INPUTS, OUTPUTS
from regraft.export.merge import Weights
from regraft.export.plan import Plan
from regraft.export.tensors import BLOCK, FLOATS, Reader
from regraft.model.params import Quantization

if TYPE_CHECKING:
    import torch

_TABLES = (
    *INPUTS,
    *OUTPUTS,
    "wpe",
    "embed_positions",
    "position_embeddings",
    "positions_embed",
    "token_type_embeddings",
)


def quantized_modules(plan: Plan, quantization: Quantization) -> list[str]:
    """Return the base's linear layers that training quantised, by the names that its files use.

    Files don't say which tensors are linear layers: a matrix called `weight` that is no known kind of embedding or
    output layer is taken for one. The verification compares with the layers that were really quantised, and drops the
    candidate where this was wrong.
    """
    if quantization.bits == 16:
        return []
    modules = []
    for step in plan.steps:
        module, _, last = step.source.rpartition(".")
        linear = last == "weight" and len(step.target.shape) == 2 and step.target.dtype in FLOATS
        if linear and module.rpartition(".")[2] not in _TABLES and not _skipped(module, quantization.skip_modules):
            modules.append(module)
    return sorted(set(modules))


def dequantized(plan: Plan, quantization: Quantization, dtype: "torch.dtype | None") -> Weights:
    """Return a source of weights as bitsandbytes gives them back after quantising them as in training.

    Args:
        plan: the merge that will read them.
        quantization: the one that the adapter was trained with, 4 or 8 bits.
        dtype: what the weights were loaded in before they were quantised; None for their own type.

    A tensor is quantised whole, since double quantisation takes a mean over all of its scales: memory is bounded by
    the largest linear layer, about twenty times smaller than the model.
    """
    modules = set(quantized_modules(plan, quantization))

    def blocks(reader: Reader, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        if name.removesuffix(".weight") not in modules:
            yield from reader.blocks(name)
            return
        weight = reader.whole(name) if dtype is None else reader.whole(name).to(dtype)
        weight = round_trip(weight.t().contiguous() if plan.conv1d else weight, quantization)
        weight = weight.t().contiguous() if plan.conv1d else weight
        rows, width = weight.shape
        step = max(1, BLOCK // max(1, width))
        for first in range(0, rows, step):
            yield first, weight[first : first + step]

    return blocks


def round_trip(weight: "torch.Tensor", quantization: Quantization) -> "torch.Tensor":
    """Quantise and dequantise a weight (out x in), in its own type."""
    import bitsandbytes.functional as bnb
    import torch

    if quantization.bits == 8:
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        rows: torch.Tensor = (codes.float() * (scales.float() / 127.0)[:, None]).to(weight.dtype)
        return rows
    packed, state = bnb.quantize_4bit(
        weight, compress_statistics=quantization.double_quant, quant_type=quantization.type
    )
    restored: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return restored


def _skipped(module: str, patterns: list[str]) -> bool:
    """Say whether transformers leaves a layer unquantised for `skip_modules` (its `should_convert_module`)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{key}){boundary}", module) or module.endswith(key) for key in patterns)
