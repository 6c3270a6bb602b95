"""The training loss, with logits only where a token is trained."""

from typing import TYPE_CHECKING, Any

from regraft.train.data import IGNORE

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """Return the negative log-likelihood of all trained tokens of a batch, summed, in fp32.

    Only the hidden states that predict a trained token reach the output layer, so logits are (trained tokens,
    vocabulary), not (blocks, length, vocabulary): where the assistant's words are a fifth of a block, that is a fifth
    of the largest tensor of a step. Whatever a model does to its logits afterwards (scaling, capping) still happens.

    Args:
        model: a causal language model, with an adapter or without.
        batch: from `regraft.train.data.collate`.
    """
    from torch.nn.functional import cross_entropy

    targets = batch["labels"][:, 1:]
    trained = (targets != IGNORE).nonzero(as_tuple=True)

    def select(_: Any, inputs: tuple["torch.Tensor", ...]) -> tuple["torch.Tensor", ...]:
        return inputs[0][trained], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets[trained], reduction="sum")
