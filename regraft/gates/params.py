"""Parameters of the gates: how much evidence is asked for. No stage depends on them: changing one reruns no stage."""

from typing import Literal

from pydantic import Field

from regraft.params import Section


class DataGate(Section):
    """Beyond the contract of the section `validate`."""

    min_rows: int = Field(default=100, ge=1)
    """Accepted rows, at least; from 1."""


class DriftGate(Section):
    """How far the accepted rows may be from those that the champion learnt from."""

    level: Literal["off", "warn", "block"] = "warn"
    """`warn` reports and lets through: new data is often meant to differ."""

    max_index: float = Field(default=0.25, gt=0)
    """Population stability index of any part (lengths, sources, each slice, pairs of words) beyond what chance gives;
    above 0. 0.1 is commonly called a small shift, 0.25 a large one."""

    max_divergence: float = Field(default=0.05, gt=0, le=1)
    """Jensen-Shannon divergence beyond what chance gives, in bits; above 0, at most 1."""

    confidence: float = Field(default=0.99, gt=0.5, lt=1)
    """Quantile of chance that is taken off first; above 0.5 and under 1."""

    resamples: int = Field(default=500, ge=100, le=100_000)
    """Of the bootstrap that says what chance gives; 100 to 100,000."""

    min_rows: int = Field(default=100, ge=1)
    """Rows that a part needs on both sides; from 1."""

    seed: int = Field(default=0, ge=0)
    """Of the bootstrap; from 0."""


class FreshnessGate(Section):
    """How old the newest accepted row may be (`data.time` names the column); see also the champion's newest row."""

    level: Literal["off", "warn", "block"] = "warn"
    """`warn` reports and lets through."""

    max_age_days: float | None = Field(default=None, gt=0)
    """Age of the newest row in days, at most; above 0, or null: any age."""


class SupervisionGate(Section):
    """What the tokenised training rows must hold."""

    min_rows: int = Field(default=100, ge=1)
    """Training rows, at least; from 1."""

    min_learning_to_stop: float = Field(default=0.99, ge=0, le=1)
    """Share of training rows that train the stop token, at least; 0 to 1. A model that never learns it rambles on."""

    min_recovered: float = Field(default=0.99, ge=0, le=1)
    """Share of answers that come back whole when the trained tokens are decoded, and of rows that survive the round trip
    through the tokenizer, at least; 0 to 1."""

    max_unknown: float = Field(default=0.001, ge=0, le=1)
    """Share of tokens that stand for text which the tokenizer does not know, at most; 0 to 1."""


class TrainingGate(Section):
    """What the training run must show."""

    min_loss_drop: float = Field(default=0.1, ge=0, lt=1)
    """By how much the mean loss of the last tenth of the steps is under that of the first, as a share of it, at least;
    0 to below 1. An adapter that learned nothing is not worth comparing."""


class ComparisonGate(Section):
    """When a challenger is better than the champion, or, before there is one, than the base."""

    min_rows: int = Field(default=100, ge=10)
    """Held-out rows, at least; from 10. A hundred equal answers still leave a difference of 0.04 possible."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided confidence of intervals; above 0.5 and under 1. A challenger that is no better passes as better with a
    chance of at most half of the rest: 0.025 at 0.95."""

    margin: float = Field(default=0.05, gt=0, lt=1)
    """Non-inferiority: the drop of the share of exact answers that must be ruled out on the rows that the champion was
    judged on; above 0 and under 1. It can be ruled out only with enough rows: about (3.5 / margin)^2 x the share of rows
    on which the two differ."""

    slice_margin: float = Field(default=0.15, gt=0, lt=1)
    """The same for each slice; above 0 and under 1. Wider, since a slice has fewer rows."""

    slice_confidence: float = Field(default=0.8, gt=0.5, lt=1)
    """Two-sided confidence of the slices' intervals; above 0.5 and under 1. Every slice must hold, so looking at many
    cannot let a bad challenger through (no correction is due); it only refuses good ones more often."""

    slice_min_rows: int = Field(default=30, ge=1)
    """Rows from which a slice is judged; smaller ones are named and left out; from 1."""

    min_new_rows: int = Field(default=20, ge=1)
    """Rows that the champion was not judged on, from which an improvement on them counts; from 1."""

    retention: float = Field(default=0.9, ge=0, le=1)
    """Share of the champion's right answers that must stay right, at least (the interval's lower end); 0 to 1."""

    floor: float = Field(default=0.5, ge=0, le=1)
    """Share of exact answers that any champion must have, at least (the interval's lower end); 0 to 1. Without it,
    small losses within the margin could add up over many promotions."""

    loss_margin: float | None = Field(default=None, gt=0)
    """Rise of the mean loss of a trained token, in nats, that must be ruled out on the rows that the champion was judged
    on; above 0, or null: the difference is reported and not judged. For tasks whose answers are free text."""

    seed: int = Field(default=0, ge=0)
    """Of the bootstrap of losses; from 0."""


class GatesParams(Section):
    """Section `gates` of `params.yaml`."""

    data: DataGate = Field(default_factory=DataGate)
    """The accepted rows."""

    drift: DriftGate = Field(default_factory=DriftGate)
    """The accepted rows against those that the champion learnt from."""

    freshness: FreshnessGate = Field(default_factory=FreshnessGate)
    """The newest accepted row."""

    supervision: SupervisionGate = Field(default_factory=SupervisionGate)
    """The tokenised rows."""

    training: TrainingGate = Field(default_factory=TrainingGate)
    """The training run."""

    comparison: ComparisonGate = Field(default_factory=ComparisonGate)
    """Champion and challenger."""
