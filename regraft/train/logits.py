"""The loss under a frozen output layer, and the gradient of its input, in one pass over chunks of logits."""

from typing import Any

import torch


def works_on(layer: Any, dtype: torch.dtype) -> bool:
    """Say whether `FrozenLoss` may take the place of an output layer that multiplies in `dtype`.

    In fp16 a gradient without the factor by which the loss is scaled would vanish.
    """
    return (
        type(layer) is torch.nn.Linear
        and not any(parameter.requires_grad or hasattr(parameter, "device_mesh") for parameter in layer.parameters())
        and dtype is not torch.float16
    )


class FrozenLoss(torch.autograd.Function):
    """Summed negative log-likelihood of labels under softmax(xWᵀ + b), for W and b that are not trained.

    ∂L/∂x = (softmax - onehot)W is made with the loss, while a chunk's logits are there: they are never made again, and
    never kept. Logits and products are in `dtype`, softmax and loss in fp32, as under autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, labels: torch.Tensor, layer: Any, chunk: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute the loss for x of (tokens, width), labels of (tokens), `chunk` tokens at once."""
        weight = layer.weight.to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for first in range(0, len(labels), chunk):
            wanted = labels[first : first + chunk, None]
            part = states[first : first + chunk].to(dtype)
            found = torch.nn.functional.linear(part, weight, bias).float().log_softmax(-1)
            likelihood = found.gather(1, wanted)
            total -= likelihood.sum()
            if gradient is not None:
                found.exp_().scatter_(1, wanted, likelihood.exp_() - 1)
                gradient[first : first + chunk] = found.to(dtype) @ weight
            del found
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * g, None, None, None, None
