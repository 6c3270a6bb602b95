"""Parameters of the stage `preprocess`: section `preprocess` of `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from regraft.params import Section


class HoldoutParams(Section):
    """Which rows are never trained on; decided by each row's own content, so that new rows move no old one."""

    share: float = Field(default=0.1, ge=0, le=0.5)
    """Share of prompts whose hash sends them to the holdout; 0 to 0.5. 0 leaves only the rows named by `always`."""

    always: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """Slice to value: rows with any of these are always held out, such as phrasings that no training row may have."""


class LeakParams(Section):
    """Which training rows come too near the holdout; they are left out and counted, the holdout stays as it is."""

    near: float | None = Field(default=None, ge=0.4, le=1)
    """Jaccard index of the word pairs of two prompts, estimated, from which a training row is left out; 0.4 to 1. With it
    go rows whose prompt has the words of a held-out one in another order. 0.6 finds paraphrases by templates. Null: only
    equal prompts. Data made from templates is near itself everywhere: leave it null there."""

    run: int | None = Field(default=None, ge=5, le=100)
    """Words in a row that a training row (all its messages) must not share with a held-out one; 5 to 100, 13 in GPT-3's
    paper. Null: not looked at. Answers that are a form filled in share long runs by their nature."""

    benchmarks: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)
    """Files of benchmarks by path, each with its sha256: a training row that shares a run of `run` words (13 where that is
    null) with any text in one is left out. Formats: see `benchmarks.py`."""


class ReplayParams(Section):
    """How much of older rows is trained on again; age is counted from the newest row, not from today."""

    half_life: float = Field(gt=0, le=36_500)
    """Days after which half of the rows are left out; above 0, up to 36,500."""

    floor: float = Field(default=0.1, ge=0, le=1)
    """Share that always stays, however old; 0 to 1. What is never repeated is forgotten."""


class MixParams(Section):
    """How much of a source is trained on; the holdout keeps every row."""

    weight: float = Field(default=1.0, ge=0, le=100)
    """How often a row is trained on in an epoch, on average; 0 to 100. Under 1 a share of the rows is left out, over 1 rows
    are repeated; which ones, each row's own content decides."""

    cap: int | None = Field(default=None, ge=1)
    """Different rows, at most; null: all. Those with the lowest hashes stay."""


class PreprocessParams(Section):
    """How conversations become tokens, which of those are learned, and which rows are held out."""

    max_length: int = Field(default=512, ge=16, le=1_048_576)
    """Longest conversation, in tokens; 16 to 1,048,576. At most the base model's context; activations grow with it."""

    too_long: Literal["drop", "fail"] = "drop"
    """What happens to a longer conversation: left out and counted, or the stage fails. It is never cut: the cut would
    fall on the answer."""

    max_dropped_share: float = Field(default=0.02, ge=0, le=1)
    """The stage refuses when more than this share of all rows is too long or has nothing to train on; 0 to 1."""

    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Whose words are learned: every answer of a conversation, its last one only (for templates that render earlier
    answers differently, and for data whose earlier answers are poor), or all tokens up to the last answer's end, for
    data whose questions are worth learning too."""

    packing: bool = True
    """Put several conversations into one block, each with positions of its own: fewer steps and hardly any padding."""

    block_length: int | None = Field(default=None, ge=16, le=1_048_576)
    """Tokens in a packed block, 16 to 1,048,576 and at least `max_length`; null is `max_length`."""

    replay: ReplayParams | None = None
    """Leave out a share of older training rows, by age; null trains on all of them. The holdout keeps every row."""

    mix: dict[str, MixParams] = Field(default_factory=dict)
    """Weight and cap of sources, by their names in `data.sources` (`other`: files in none); here and not there, so that another
    mixture validates nothing again."""

    near_duplicates: float | None = Field(default=None, ge=0.4, le=1)
    """Jaccard index of the word pairs of two training rows (all that is said in them), estimated, from which the later one is
    left out; 0.4 to 1. 0.8 finds copies with small edits. Null: only equal rows are left out."""

    holdout: HoldoutParams = Field(default_factory=HoldoutParams)
    """Which rows are held out."""

    leaks: LeakParams = Field(default_factory=LeakParams)
    """Which training rows come too near the holdout."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "PreprocessParams":
        if self.block_length is not None and self.block_length < self.max_length:
            raise ValueError(f"a `block_length` of at least `max_length` ({self.max_length}), or null")
        if self.block_length is not None and not self.packing:
            raise ValueError("no `block_length` where `packing` is false: each conversation is a block of its own")
        return self
