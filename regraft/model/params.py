"""Parameters of the base model: which one, how it is quantised, how it attends."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from regraft.late import LateFields
from regraft.model.standin import StandinParams
from regraft.params import Section

STANDIN = "standin"
"""The value of `model.base` that stands for the model trained here, on the shipped corpus."""

Dtype = Literal["auto", "bf16", "fp16", "fp32"]


class Quantization(LateFields, Section):
    """How the frozen base lies in memory while an adapter is trained and evaluated on it (QLoRA, arXiv:2305.14314)."""

    LATE: ClassVar[frozenset[str]] = frozenset({"unquantized"})

    bits: Literal[4, 8, 16, 32] = 4
    """Bits for each weight of a linear layer: 4 or 8 (bitsandbytes), 16 for the weights as they are stored (or in
    `compute_dtype`, where one is named), 32 for all of them in fp32."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Code book of 4-bit weights. NF4 suits normally distributed weights, which trained ones are."""

    double_quant: bool = True
    """Quantise the scales of 4-bit blocks too: saves 0.37 bits for each weight, at no measurable loss."""

    compute_dtype: Dtype = "auto"
    """What matrices are multiplied in. `auto`: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""

    int8_threshold: float = Field(default=6.0, ge=0, le=1000)
    """Input features with a value beyond it are multiplied in 16 bits (LLM.int8, arXiv:2208.07339); 0 to 1000, 0 turns
    that off. Only where `bits` is 8."""

    skip_modules: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Names of linear layers that stay unquantised, besides the output layer, which always does."""

    unquantized: Literal["auto", "compute", "fp32"] = "auto"
    """What the rest of a 4- or 8-bit base (embeddings, output layer, norms) is held in while an adapter is trained.
    `compute`: in `compute_dtype`, as it is evaluated. `fp32`: as PEFT's `prepare_model_for_kbit_training` casts it, which
    doubles its memory, and that of the stream between layers. `auto`: `fp32` where fp16 is computed in, since that
    stream can leave its range, else `compute`."""


def keeps_fp32(unquantized: str, *, fp16: bool) -> bool:
    """Say whether the rest of a quantised base is held in fp32 while training; `fp16`: whether that is computed in."""
    return unquantized == "fp32" or (unquantized == "auto" and fp16)


class ModelParams(LateFields, Section):
    """The base model that adapters are trained on."""

    LATE: ClassVar[frozenset[str]] = frozenset({"new_tokens"})

    base: str = Field(default=STANDIN, min_length=1)
    """`standin`, a folder with safetensors weights, config and tokenizer, or the id of a model on the Hugging Face hub."""

    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Commit of a hub model, 40 hexadecimal digits: a branch moves, and a version must name the weights it is for."""

    new_tokens: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list)
    """Tokens that the base's tokenizer lacks, by spelling: it is extended by them, and their embeddings are trained with
    the adapter (both ends, where they are not tied). For tokens that it has, `train.trainable_tokens`."""

    standin: StandinParams = Field(default_factory=StandinParams)
    """The small model that is trained here when `base` is `standin`."""

    quantization: Quantization = Field(default_factory=Quantization)
    """How the base lies in memory."""

    attention: Literal["auto", "sdpa", "eager", "flex", "varlen"] = "sdpa"
    """Attention kernel while training. `sdpa`: PyTorch's fused one. `eager`: plain matrix products, slower and easier to
    inspect. `flex`: FlexAttention with a block mask. `varlen`: torch's kernel for packed documents, which never looks at
    pairs of tokens of different ones; both need a GPU. `auto`: `varlen` where GPU and model can, else `sdpa`."""

    @model_validator(mode="after")
    def _check(self) -> "ModelParams":
        if self.base == STANDIN and self.revision is not None:
            raise ValueError("a `revision` only where `base` is the id of a hub model; the stand-in has none")
        odd = [token for token in self.new_tokens if token != token.strip() or self.new_tokens.count(token) > 1]
        if odd:
            raise ValueError(f"`new_tokens` that differ and begin and end with no blank, not {odd[0]!r}")
        return self
