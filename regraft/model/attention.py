"""Attention for packed blocks: which kernel a machine and a model can use, and torch's variable-length one.

A packed block holds several documents whose positions restart. With `sdpa` and `flex` transformers makes a
block-diagonal mask from those positions; `varlen` never computes the pairs that such a mask would hide.
"""

import inspect
from functools import cache
from typing import Any

import torch

from regraft.errors import ParamsError

VARLEN = "regraft_varlen"
"""The name under which the variable-length kernel is registered with transformers."""


def implementation(attention: str, *, training: bool, dtype: torch.dtype, config: Any) -> str:
    """Return what transformers calls the kernel that `model.attention` means for this machine and model.

    Outside training, where batches are padded and not packed, all but `eager` mean `sdpa`.

    Raises:
        ParamsError: the kernel was asked for by name, and machine or model cannot.
    """
    if not training:
        return "eager" if attention == "eager" else "sdpa"
    if attention in ("sdpa", "eager"):
        return attention
    obstacle = _obstacle(dtype, config)
    if attention == "auto":
        if obstacle is None:
            register()
        return "sdpa" if obstacle else VARLEN
    if attention == "flex":
        if not torch.cuda.is_available():
            raise ParamsError(
                "model.attention: found flex, whose backward pass needs a GPU", fix="set model.attention: auto"
            )
        return "flex_attention"
    if obstacle:
        raise ParamsError(f"model.attention: found varlen, but {obstacle}", fix="set model.attention: auto")
    register()
    return VARLEN


def register() -> None:
    """Make transformers know the variable-length kernel; it gets no mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each document, as transformers calls an attention function.

    Args:
        module: the attention layer.
        query: (blocks, heads, length, width).
        key: (blocks, key heads, length, width).
        value: as `key`.
        attention_mask: none: boundaries are in `cu_seq_lens_q`.
        dropout: must be 0; no model of the field trains with dropout in attention.
        scaling: of the scores.
        cu_seq_lens_q: int32, where each document of the flattened batch begins, and the end; see `boundaries`.
        max_length_q: length of the longest document.
        sliding_window: tokens that a token sees, itself included.
        kwargs: what other kernels need.
    """
    assert attention_mask is None
    assert dropout == 0.0
    blocks, heads, length, _ = query.shape
    # Norms in fp32 and 4-bit layers leave fp32 under autocast; the kernel takes 16 bits.
    kind = value.device.type
    cast = value.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else value.dtype
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out = _kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    return out.reshape(blocks, length, heads, -1), None


def boundaries(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return what `varlen_attention` needs of a batch: where documents begin when its blocks are laid end to end."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    return told(ends, int(ends.diff().max()))


def told(ends: torch.Tensor, longest: Any) -> dict[str, Any]:
    """Return boundaries as transformers hands them to an attention function."""
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {"scale": scale, "window_size": window}
    # Later versions of torch want to be told of heads in groups; 2.11 takes them as they come.
    if query.shape[1] != key.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = True
    out = varlen_attn(query, key, value, ends, ends, longest, longest, **settings)
    assert isinstance(out, torch.Tensor)
    return out


@cache
def _trial(heads: int, key_heads: int, width: int, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """Attend once, forward and back, with a model's heads; say what went wrong, if anything.

    The kernel's interface is a young one: its arguments have changed between versions of torch.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((48, heads, width), (48, key_heads, width), (48, key_heads, width), (48, heads, width))
    *inputs, g = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    ends = torch.tensor([0, 20, 48], dtype=torch.int32, device=device)
    found = []
    try:
        for attend in (_by_kernel, _by_document):
            q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
            out = attend(q, k, v, ends)
            found.append([each.detach().float() for each in (out, *torch.autograd.grad(out, (q, k, v), g))])
    except (RuntimeError, TypeError, ImportError) as error:
        return f"torch {torch.__version__}'s kernel fails here: {str(error).splitlines()[0]}"
    for one, other in zip(*found, strict=True):
        if not float((one - other).norm()) <= 0.03 * float(other.norm()):
            return f"torch {torch.__version__}'s kernel computes something else than SDPA here"
    return None


def _by_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _kernel(q, k, v, ends, int(ends.diff().max()), None, (-1, 0))


def _by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """SDPA on one document after the other."""
    out = []
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        query, key, value = (tensor[first:last].transpose(0, 1)[None] for tensor in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def _obstacle(dtype: torch.dtype, config: Any) -> str | None:
    """Say what is in the way of the variable-length kernel, if anything."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if width > 256:
        return f"its heads of {width} are wider than 256"
    if getattr(text, "attn_logit_softcapping", None):
        return "this model caps its attention scores"
    heads = text.num_attention_heads
    return _trial(heads, getattr(text, "num_key_value_heads", None) or heads, width, dtype)
