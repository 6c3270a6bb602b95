"""What evaluation measured; the comparison gate decides from it and from the answers."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from regraft.late import LateFields
from regraft.report import Report

BASE = "base"
"""The name under which the base without an adapter is scored."""


class Score(BaseModel):
    """Averages over some rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    exact_match: float
    """Share of rows answered exactly (as text after strip or, for JSON answers, as equal values)."""
    json_valid: float | None
    """Share of answers that are JSON; null where answers are not meant to be."""
    stopped: float
    """Share of answers that ended with a stop token within `max_new_tokens`."""
    loss: float | None
    """Mean negative log likelihood of a trained token, in nats; null where a row's loss was not finite."""
    perplexity: float | None
    """exp(loss)."""
    non_finite: int
    """Rows whose loss was not finite."""


class AdapterScores(BaseModel):
    """One adapter's scores: over all rows, and for each value of each slice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overall: Score
    slices: dict[str, dict[str, Score]]


class PreferenceScore(BaseModel):
    """How a model ranks held-out answers; see `regraft.evaluate.preferences`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    pairs: int
    """Rows with two answers."""
    likelihood_accuracy: float | None
    """Share of the pairs whose preferred answer has the higher mean log likelihood of a token; null without pairs."""
    reward_accuracy: float | None
    """Share of the pairs whose preferred answer has the higher reward; null for the base, whose rewards are 0."""
    reward_margin: float | None
    """Mean reward of the preferred answers minus that of the others, in nats; null where one is not finite, too."""
    single_accuracy: float | None
    """Of single answers: how often one that is wanted has a higher reward than one that is not (ties count half)."""
    single_margin: float | None
    """Mean reward of the single answers that are wanted minus that of those that are not, in nats."""


class PreferenceScores(BaseModel):
    """One model's: over all rows, and for each value of each slice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overall: PreferenceScore
    slices: dict[str, dict[str, PreferenceScore]]


class EvaluateReport(LateFields, Report):
    """Scores of the base and of adapters on one holdout; equal inputs give equal bytes on a CPU."""

    LATE: ClassVar[frozenset[str]] = frozenset({"preferences"})

    base_digest: str
    tokenizer_digest: str
    holdout_digest: str
    """sha256 of the holdout's Arrow file (of the canonical JSON list of them and of held-out preferences, where there
    are several)."""
    params_digest: str
    """Digest of the parameters that scores depend on: the section `evaluate` and `model.quantization`."""
    code_digest: str
    """Digest of the modules that score and of the versions of the numeric libraries."""
    rows: int
    held_out: int
    """Rows of the holdout; more than `rows` where `max_rows` left some out."""
    answers_too_long: int
    """Rows whose expected answer has more tokens than `max_new_tokens`: they cannot be answered exactly."""
    adapters: dict[str, str]
    """Digest of each adapter by the name that it was scored under; the base has none and is not listed."""
    scores: dict[str, AdapterScores]
    """By name; `base` is the base without an adapter."""
    preferences: dict[str, PreferenceScores] | None = None
    """By name, where the holdout has preferences; else left out."""
