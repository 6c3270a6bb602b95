"""The training loss, with logits only where a token is trained, and in chunks where memory or speed asks for it."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from regraft.train.data import IGNORE

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: dict[str, "torch.Tensor"], prompt_tokens: int = 0) -> "torch.Tensor":
    """Return the negative log-likelihood of all trained tokens of a batch, summed, in fp32.

    Only the hidden states that predict a trained token reach the output layer, so logits are (trained tokens,
    vocabulary), not (blocks, length, vocabulary): where the assistant's words are a fifth of a block, that is a fifth
    of the largest tensor of a step. Whatever a model does to its logits afterwards (scaling, capping) still happens.

    Args:
        model: a causal language model, with an adapter or without.
        batch: from `regraft.train.data.collate`.
        prompt_tokens: vectors that the model puts before each block, which then must be a single document.
    """
    from torch.nn.functional import cross_entropy

    inner = getattr(model, "module", model)  # of several processes each wraps its model
    targets, trained = batch["labels"][:, 1:], _trained(batch)

    def select(_: Any, inputs: tuple["torch.Tensor", ...]) -> tuple["torch.Tensor", ...]:
        rows, columns = trained
        return inputs[0][rows, columns + prompt_tokens], *inputs[1:]

    hook = inner.get_output_embeddings().register_forward_pre_hook(select)
    # With a prompt the model counts positions itself: padding is on the right, where causal attention does not look.
    where = {} if prompt_tokens else positions(inner, batch)
    try:
        logits = model(input_ids=batch["input_ids"], use_cache=False, **where).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets[trained], reduction="sum")


def positions(model: Any, batch: dict[str, "torch.Tensor"]) -> dict[str, Any]:
    """Return what tells a model's attention where the documents of a batch begin."""
    from regraft.model.attention import VARLEN, told

    found: dict[str, Any] = {"position_ids": batch["position_ids"]}
    if model.config._attn_implementation == VARLEN:
        found |= told(batch["ends"], batch["longest"])
    return found


def _trained(batch: dict[str, Any]) -> "tuple[torch.Tensor, ...]":
    """Block and place of the hidden states that predict a trained token."""
    if "trained" in batch:
        return tuple(batch["trained"])
    return tuple((batch["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True))


CHUNK = 1024
"""Trained tokens whose logits are held at once by `chunked_loss`: 0.5 GB in fp32 for a vocabulary of 128,000."""
_AFTER_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def can_chunk(model: Any, prompt_tokens: int) -> bool:
    """Say whether a model's logits are what its output layer gives: no capping or scaling comes after it."""
    config = model.config.get_text_config()
    return not prompt_tokens and all(getattr(config, name, None) in (None, 1, 1.0) for name in _AFTER_LOGITS)


def chunked_loss(model: Any, batch: dict[str, "torch.Tensor"], chunk: int = CHUNK) -> "torch.Tensor":
    """Return what `summed_loss` does without ever holding the logits of more than `chunk` tokens.

    Under a frozen output layer each chunk's gradient is made with its loss (`regraft.train.logits`); where that layer is
    trained or adapted, the backward pass makes each chunk's logits again. Only for models that `can_chunk`.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    from regraft.train.logits import FrozenLoss, works_on

    inner = getattr(model, "module", model)  # of several processes each wraps its model
    targets, trained = batch["labels"][:, 1:], _trained(batch)
    layer, wanted = inner.get_output_embeddings(), targets[trained]
    hidden: list[torch.Tensor] = []
    autocast: list[torch.dtype] = []
    kind = batch["input_ids"].device.type

    def capture(_: Any, inputs: tuple["torch.Tensor", ...]) -> tuple["torch.Tensor", ...]:
        hidden.append(inputs[0][trained])
        if torch.is_autocast_enabled(kind):
            autocast.append(torch.get_autocast_dtype(kind))
        return inputs[0][:, :0], *inputs[1:]  # the model's own logits are of no token

    hook = layer.register_forward_pre_hook(capture)
    try:
        model(input_ids=batch["input_ids"], use_cache=False, **positions(inner, batch))
    finally:
        hook.remove()

    dtype = autocast[0] if autocast else hidden[0].dtype
    if works_on(layer, dtype):
        loss: torch.Tensor = FrozenLoss.apply(hidden[0], wanted, layer, chunk, dtype)
        return loss

    def part(states: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        with torch.autocast(kind, autocast[0]) if autocast else nullcontext():
            logits = layer(states)
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    total = hidden[0].new_zeros((), dtype=torch.float32)
    for states, labels in zip(torch.split(hidden[0], chunk), torch.split(wanted, chunk), strict=True):
        total = total + checkpoint(part, states, labels, use_reentrant=False)
    return total
