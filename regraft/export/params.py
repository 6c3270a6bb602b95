"""Parameters of the export."""

from typing import Literal

from pydantic import Field, field_validator

from regraft.params import Section

Source = Literal["original", "dequantized"]


class ExportParams(Section):
    """How the champion is merged into its base, and how closely the merged files must behave like it."""

    dtype: Literal["own", "bf16", "fp16", "fp32"] = "bf16"
    """What the merged weights are stored in; `own` keeps each tensor's type in the base. The sum is made in fp32."""

    candidates: list[Source] = Field(default=["original", "dequantized"], min_length=1, max_length=2)
    """Bases to merge into: the weights as they were published, and those that the adapter saw in training, quantised
    and back. Which one is nearer is measured each time; the nearer one ships. Each costs the model's size on disk."""

    rows: int = Field(default=256, ge=1, le=100_000)
    """Held-out rows that are compared, at most; 1 to 100,000. A digest of each row's content picks them, so they stay
    the same while the holdout grows."""

    min_top1_agreement: float = Field(default=0.99, ge=0, le=1)
    """Least share of the answers' tokens at which both models find the same token likeliest; 0 to 1."""

    max_mean_kl: float = Field(default=0.01, ge=0)
    """Largest mean divergence KL(adapter on its training base ‖ merged) over the answers' tokens, in nats; from 0."""

    max_exact_match_drop: float = Field(default=0.01, ge=0, le=1)
    """How much lower the merged model's share of exactly right answers may be; 0 to 1. A better one always passes."""

    keep: int = Field(default=3, ge=1, le=1000)
    """Exports to keep, the newest included; 1 to 1000. The champion's and the one that `latest` names are never
    removed."""

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, value: list[Source]) -> list[Source]:
        if len(set(value)) != len(value):
            raise ValueError("each candidate once")
        return value
