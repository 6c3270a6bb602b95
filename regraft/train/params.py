"""Parameters of training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from regraft.params import Section


class TrainParams(Section):
    """How an adapter is trained; LoRA after arXiv:2106.09685, on a quantised base after arXiv:2305.14314."""

    seed: int = Field(default=7, ge=0, lt=2**31)
    """Seeds A's initial values, dropout and the order of the data; 0 to 2^31 - 1."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of every adapter; 1 to 1024. Its size and cost grow in proportion."""

    alpha: float = Field(default=32, gt=0, le=8192)
    """Scale: the adapter's output is multiplied by alpha / rank; up to 8192. Twice the rank is a common start."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped while training; 0 to below 1. Helps small data sets, costs time."""

    target_modules: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = "all-linear"
    """Which linear layers get an adapter: all but the output layer, or a list of last names such as `q_proj`."""

    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak learning rate; up to 1. About ten times what full fine-tuning of the same model would use."""

    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the rate falls after the warm-up."""

    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises from zero; 0 to below 1."""

    epochs: float | None = Field(default=None, gt=0, le=1000)
    """Passes over the training set; up to 1000. Give this or `max_steps`."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, at least 1, whatever the size of the training set. Give this or `epochs`."""

    batch_size: int = Field(default=8, ge=1, le=4096)
    """Packed blocks that go through the model at once; 1 to 4096. Memory grows in proportion."""

    accumulation: int = Field(default=1, ge=1, le=4096)
    """Batches whose gradients are summed for one step; 1 to 4096. Like a larger batch, without its memory."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's decoupled decay of A and B; 0 to 1."""

    beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's decay of the squared gradients' mean; above 0, below 1. 0.99 adapts faster, for runs of few steps."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm, over all parameters together, where they exceed it."""

    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch"
    )
    """The 8-bit ones quarter the optimizer's state, the paged ones move it to the CPU when a GPU is full."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time for a fraction of the memory."""

    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints, at least 1: what a kill can cost. The last step always gets one."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints to keep, at least 1; with 2 a damaged newest one costs only the steps since the other."""

    logging_every: int = Field(default=5, ge=1)
    """Steps between lines of `metrics.jsonl`, at least 1; a line's loss is the mean since the line before."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of torch; null leaves its choice. Sums depend on it, so equal bytes need an equal number."""

    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the adapter is saved in; it is always trained in fp32, since bf16 loses small updates."""

    @model_validator(mode="after")
    def _check_length(self) -> "TrainParams":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of `epochs` and `max_steps`")
        return self
