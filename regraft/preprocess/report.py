"""What `preprocess` counted and measured: evidence for the supervision gate, digests for lineage."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regraft.late import LateFields
from regraft.report import Report


class Counts(LateFields):
    """Where every accepted row went; `rows_in` is the sum of all others but `repeated`. The last four are left out at 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    LATE: ClassVar[frozenset[str]] = frozenset({"decontaminated", "near_duplicates", "repeated", "sampled"})

    rows_in: int
    """Rows of `data/work/validate/rows.parquet`."""
    train: int
    """Rows in the training blocks."""
    holdout: int
    """Rows in the holdout."""
    deduplicated: int
    """Rows whose prompt and answer another row on the same side has too."""
    leaked: int
    """Rows of the training side left out because their prompt is in the holdout."""
    near_holdout: int = 0
    """Rows of the training side left out because their prompt is nearly one of the holdout, or has the same words."""
    contaminated: int = 0
    """Rows of the training side left out because they share a long run of words with the holdout."""
    too_long: int
    """Rows of either side with more than `max_length` tokens; left out, not cut."""
    nothing_to_train: int
    """Rows without an answer, or whose answer has no token."""
    aged: int = 0
    """Training rows left out for their age, by `preprocess.replay`."""
    decontaminated: int = 0
    """Training rows left out because they share a long run of words with a listed benchmark."""
    near_duplicates: int = 0
    """Training rows left out because an earlier one that stays is nearly the same."""
    sampled: int = 0
    """Training rows left out by the weight or cap of their source, by `preprocess.mix`."""
    repeated: int = 0
    """Further copies of training rows, by the weight of their source; not among the rows that came in."""

    @model_validator(mode="after")
    def _check_sum(self) -> "Counts":
        parts = sum(getattr(self, name) for name in type(self).model_fields if name not in ("rows_in", "repeated"))
        if parts != self.rows_in:
            raise ValueError(f"the counts add up to {parts}, but {self.rows_in} rows came in")
        return self


class Supervision(BaseModel):
    """The supervision audit, measured on the finished tokens and labels (not on how they were made)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    """Training rows audited: all of them."""
    tokens: int
    """Tokens of the training rows."""
    trained_tokens: int
    """Tokens with a label other than -100."""
    answers: int
    """Answers to be learned (more than `rows` where conversations have several)."""
    rows_training_nothing: int
    """Training rows without a single trained token; must be 0."""
    rows_learning_to_stop: float
    """Share of training rows whose last trained token ends the turn; must be 1."""
    answers_recovered: float
    """Share of answers whose whole text comes back when the trained tokens are decoded; must be near 1."""
    answers_exact: float
    """Share of answers whose trained tokens are the answer and its stop token and nothing else; under 1 where the
    template adds words that the model has to write itself, such as an empty thought."""
    round_trip: float
    """Share of rows whose tokens decode to the rendered text, up to Unicode composition; must be near 1."""
    agreement: float
    """Share of the rows compared in which the plain tokenizer gives the same tokens for the rendered text."""
    agreement_rows: int
    """Rows compared: one in 64; of those that went through the template itself the first 256 and a sixteenth of the
    others, without those of `control_text` and `kept_apart`."""
    kept_apart: int
    """Rows in which the tokenizer would have merged the end of the prompt with the start of the answer."""
    control_text: int
    """Rows in which somebody typed a control token; it became text."""
    control_leaked: int
    """Control tokens that do not come from the template; must be 0."""
    unknown_tokens: int
    """Tokens that stand for text which the tokenizer does not know."""
    truncated: int
    """Rows that were cut; always 0."""
    longest: int
    """Tokens of the longest training row."""
    dropped_share: float
    """Share of all rows that were too long or had nothing to train on."""


class PreferenceCounts(BaseModel):
    """Preferences that were prepared, and the audit of the answers that are not wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_pairs: int
    """Training rows with two answers."""
    train_wanted: int
    """Training rows with one answer, which is wanted."""
    train_unwanted: int
    """Training rows with one answer, which is not."""
    holdout_rows: int
    """Held-out rows of all three kinds."""
    supervision: Supervision
    """Of the answers that are not wanted, in training rows; `rows` counts also those whose other answer did not fit."""


class PreprocessReport(LateFields, Report):
    """Result of the stage `preprocess`."""

    LATE: ClassVar[frozenset[str]] = frozenset({"benchmarks", "preferences"})

    counts: Counts
    supervision: Supervision
    benchmarks: dict[str, int] = Field(default_factory=dict)
    """Training rows that share a run of words with each listed benchmark; left out where none is listed."""
    preferences: PreferenceCounts | None = None
    """Null, and left out, where rows are conversations."""
    holdout_slices: dict[str, dict[str, int]]
    """Holdout rows by slice and value."""
    train_slices: dict[str, dict[str, int]]
    """Training rows by slice and value."""
    max_length: int
    """Tokens; the parameter."""
    supervise: str
    """The parameter."""
    blocks: int
    """Rows of `train-00000.arrow`."""
    block_length: int
    """Tokens that a block may hold."""
    block_fill: float
    """Tokens of all blocks over what they could hold."""
    longest_block: int
    """Tokens of the longest block."""
    stop_token_ids: list[int]
    """What ends an answer; the template's own end of turn first."""
    template_digest: str
    """Digest of the chat template."""
    tokenizer_digest: str
    """As `BaseReport` has it."""
    base: str
    """Name of the base model whose tokenizer was used."""
    rows_digest: str
    """sha256 of the rows that came in (`rows.parquet`)."""
    train_digest: str
    """sha256 of `train-00000.arrow` (of the canonical JSON list of them, and of `pairs-*.arrow`, where there are several)."""
    holdout_digest: str
    """sha256 of `holdout-00000.arrow`, likewise with `holdout_pairs-*.arrow`."""
