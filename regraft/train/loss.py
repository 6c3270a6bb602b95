"""The training loss, with logits only where a token is trained."""

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

    from regraft.model.attention import VARLEN, boundaries

    targets = batch["labels"][:, 1:]
    trained = (targets != IGNORE).nonzero(as_tuple=True)

    def select(_: Any, inputs: tuple["torch.Tensor", ...]) -> tuple["torch.Tensor", ...]:
        rows, columns = trained
        return inputs[0][rows, columns + prompt_tokens], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    # With a prompt the model counts positions itself: padding is on the right, where causal attention does not look.
    positions: dict[str, Any] = {} if prompt_tokens else {"position_ids": batch["position_ids"]}
    if model.config._attn_implementation == VARLEN:
        positions |= boundaries(batch["position_ids"])
    try:
        logits = model(input_ids=batch["input_ids"], use_cache=False, **positions).logits
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets[trained], reduction="sum")
