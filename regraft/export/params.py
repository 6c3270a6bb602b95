"""Parameters of the export."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator

from regraft.params import Section

Source = Literal[
    "original",
    "dequantized",
    "original-bf16",
    "original-fp16",
    "original-fp32",
    "dequantized-bf16",
    "dequantized-fp16",
    "dequantized-fp32",
]
Form = Literal["adapter", "nf4", "int8", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "onnx-fp32", "onnx-int8", "onnx-int4"]
Dtype = Literal["own", "bf16", "fp16", "fp32"]


class Server(StrEnum):
    """Whose server `regraft serve --check` asks."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"


class ExportParams(Section):
    """How the champion is merged into its base, and how closely the merged files must behave like it."""

    dtype: Dtype = "bf16"
    """What the merged weights are stored in; `own` keeps each tensor's type in the base. The sum is made in fp32."""

    candidates: list[Source] = Field(default=["original", "dequantized"], min_length=1, max_length=8)
    """Bases to merge into: the weights as they were published, and those that the adapter saw in training, quantised
    and back. Which one is nearer is measured each time; the nearer one ships. Each costs the model's size on disk. A
    name such as `original-fp16` stores that candidate in another type than `dtype`."""

    rows: int = Field(default=256, ge=1, le=100_000)
    """Held-out rows that are compared, at most; 1 to 100,000. A digest of each row's content picks them, so they stay
    the same while the holdout grows."""

    min_top1_agreement: float = Field(default=0.99, ge=0, le=1)
    """Least share of the answers' tokens at which both models find the same token likeliest; 0 to 1."""

    max_mean_kl: float = Field(default=0.01, ge=0)
    """Largest mean divergence KL(adapter on its training base ‖ merged) over the answers' tokens, in nats; from 0."""

    max_exact_match_drop: float = Field(default=0.01, ge=0, le=1)
    """How much lower the merged model's share of exactly right answers may be; 0 to 1. A better one always passes."""

    min_delta_survival: float = Field(default=0.3, ge=-1, le=1)
    """Least cosine between the change that the stored weights make and the one that was learnt, over all modules; -1 to
    1. Rounding to bf16 leaves 0.99 of a change of 1 % and 0.64 of one of 0.1 %; to 4 bits it leaves nothing (0.03)."""

    forms: list[Form] = Field(default_factory=list)
    """What else to publish beside the merged weights, each in a folder of its name: the bare adapter (for PEFT and
    vLLM), bitsandbytes checkpoints, GGUF for llama.cpp and Ollama (needs the extra `gguf`), ONNX for onnxruntime-genai (needs the
    extra `onnx`). Each is loaded from disk and measured; one that fails is a refusal of the whole export."""

    min_form_top1_agreement: float = Field(default=0.9, ge=0, le=1)
    """Like `min_top1_agreement`, for forms of less than 16 bits; 0 to 1."""

    max_form_mean_kl: float = Field(default=0.1, ge=0)
    """Like `max_mean_kl`, for forms of less than 16 bits; in nats, from 0."""

    keep: int = Field(default=3, ge=1, le=1000)
    """Exports to keep, the newest included; 1 to 1000. The champion's and the one that `latest` names are never
    removed."""

    @field_validator("candidates", "forms")
    @classmethod
    def _check_each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("each candidate once")
        return value


def split_source(source: Source, dtype: Dtype) -> tuple[str, Dtype]:
    """Return a candidate's base (`original`, `dequantized`) and the type of its weights."""
    base, _, own = source.partition("-")
    return base, own or dtype  # type: ignore[return-value]  # the literals' second parts are types
