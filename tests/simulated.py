"""One training step traced without data (fake tensors), as the GPU would run it: which bytes are held, and when.

What runs is transformers, PEFT and the trainer's own loss at full size, in a second, on a machine without a GPU.
Attention is the kernel that a GPU would take. Allocations are rounded to 512 bytes, like torch's.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from regraft.plan.setup import Setup


class Held(TorchDispatchMode):
    """Bytes of all storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or not storage.nbytes():
            return
        self.sizes[key] = -(-storage.nbytes() // 512) * 512
        self.now += self.sizes[key]
        weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def step(config: Any, setup: Setup) -> dict[str, int]:
    """Trace one step of `setup` on the model of `config`: `base`, `adapter`, `saved` after the forward pass, `peak`."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    held, found = Held(), {}
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), held:
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager" if setup.attention == "eager" else "sdpa"
        )
        model.config.use_cache = False
        output = model.get_output_embeddings()
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output]
        if setup.bits == 4:
            # as transformers chooses: a subclass of Linear stays
            chosen = [n for n in names if type(model.get_submodule(n)) in (torch.nn.Linear, Conv1D)]
            for name in chosen:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, _quantized(model.get_submodule(name)))
            model.is_loaded_in_4bit = True
            if setup.unquantized_fp32:
                for parameter in model.parameters():
                    if parameter.dtype == torch.bfloat16:
                        parameter.data = parameter.data.float()
        model.requires_grad_(False)
        found["base"] = held.now
        stay = patch.object(torch.nn.Module, "to", lambda self, *a, **k: self)
        still = patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda self, *a, **k: None)
        lora = LoraConfig(
            r=setup.rank, lora_alpha=32, lora_dropout=0.1 * setup.dropout, target_modules=names, task_type="CAUSAL_LM"
        )
        with stay, still:
            model = get_peft_model(model, lora)
        found["adapter"] = held.now - found["base"]
        if setup.fused:
            from regraft.train.kernels import use_fused_kernels

            assert use_fused_kernels(model) == len(names)
        if setup.liger:
            _as_liger(model)
        if setup.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            if parameter.requires_grad:  # as in all but the first of accumulated batches
                parameter.grad = torch.zeros_like(parameter)
        found["gradients"] = held.now - found["base"] - found["adapter"]
        before = held.now
        held.peak = before
        with _as_on_a_gpu():
            loss = _loss(model.train(), setup)
            found["saved"] = held.now - before
            loss.backward()
        found["peak"] = held.peak - before
    return found


def _as_liger(model: Any) -> None:
    """Norms and gates that keep what Liger's do (liger_kernel 0.8.5, ops/rms_norm.py and ops/swiglu.py)."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = functools.partial(lambda module, x: _Norm.apply(x, module.weight), module)
        elif kind.endswith("MLP"):
            module.forward = functools.partial(
                lambda module, x: module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x))), module
            )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g, None  # in place


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any, b: Any) -> Any:
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return ctx.saved_tensors  # in place


def _loss(model: Any, setup: Setup) -> torch.Tensor:
    from regraft.train.loss import chunked_loss, summed_loss

    positions = torch.arange(setup.length).repeat(setup.batch, 1)
    ids = torch.zeros(setup.batch, setup.length, dtype=torch.long)
    count = int(setup.trained * setup.tokens)
    rows, columns = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    labels = torch.zeros(setup.batch, setup.length + 1, dtype=torch.long)
    with patch.object(torch.Tensor, "nonzero", lambda self, **_: (rows, columns)):
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return summed_loss(model, batch) if setup.chunk is None else chunked_loss(model, batch, setup.chunk)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """bf16 autocast, which PEFT asks for by the GPU's name, and the attention kernels of a GPU."""
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),  # first: it puts back what it found
        patch.object(torch, "is_autocast_enabled", lambda *_: True),
        patch.object(torch.nn.functional, "dropout", _dropout),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
    ):
        yield


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    q, k, v = (each.to(torch.bfloat16) for each in (q, k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
    bias = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, True, dropout_p, False, scale=scale)[0]


def _quantized(layer: Any) -> Any:
    """bitsandbytes' 4-bit layer on a weight without data."""
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul4Bit

    class Layer(bnb.nn.Linear4bit):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            weight = layer.weight.data if isinstance(layer, torch.nn.Linear) else layer.weight.data.t().contiguous()
            self.out_features, self.in_features = weight.shape
            packed, self.state = bnb.functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
            self.weight.quant_state = self.state
            self.bias, self.compute_dtype = layer.bias, torch.bfloat16

        def forward(self, x: Any) -> Any:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            out = MatMul4Bit.apply(x.to(self.compute_dtype), self.weight, None, bias, self.state)
            return out.to(x.dtype)

    return Layer()
