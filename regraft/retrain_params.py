"""Section `retrain` of `params.yaml`: where the stages of a retraining run, and how long a step may take."""

from typing import Literal

from pydantic import Field, PositiveInt

from regraft.params import Section


class Timeouts(Section):
    """Seconds that each step may take; a step that takes longer is stopped (training after a checkpoint)."""

    model: PositiveInt = 1_800
    """The base model: at least the download of its weights."""
    validate_: PositiveInt = Field(default=3_600, alias="validate")
    """About 100,000 rows a minute on one core."""
    preprocess: PositiveInt = 14_400
    """Tokenising; about 20,000 tokens a second and core on a slow machine."""
    train: PositiveInt = 172_800
    """Two days; what was trained by then is in the checkpoints, so the next run goes on from there."""
    evaluate: PositiveInt = 28_800
    """Answering the whole holdout twice: by the base and by the challenger."""
    verdict: PositiveInt = 14_400
    """Answering the holdout once more where the champion has not been scored on it yet."""
    register_: PositiveInt = Field(default=900, alias="register")
    """Uploading the adapter; `register.timeout` limits each call of the service."""
    promote: PositiveInt = 900
    """Reading the version's files, which are downloaded from a server and hashed, and moving an alias."""
    export: PositiveInt = 14_400
    """Merging, and reading the merged files again in a fresh process."""

    def of(self, step: str) -> int:
        """Return the seconds for a step by its name in `params.yaml`."""
        return int(self.model_dump(by_alias=True)[step])


class Decide(Section):
    """What a change of the data has to amount to, against the rows that the champion was made from."""

    min_rows: int = Field(default=0, ge=0)
    """Rows that are new, changed or removed; fewer are not trained on yet. 0: every change is."""
    min_share: float = Field(default=0.0, ge=0, le=1)
    """The same as a share of the champion's rows."""
    continue_below: float = Field(default=0.0, ge=0, le=1)
    """Up to this share of rows that differ, training goes on from the champion's adapter (`train.parent` is written into
    `params.yaml`), and afresh beyond it. 0: `train.parent` is left as it is."""


class RetrainParams(Section):
    """How `regraft retrain` and its deployments run the steps; nothing here changes what a stage computes."""

    placement: Literal["in_place", "pool"] = "in_place"
    """`pool`: train and evaluate are flow runs on the work pool `regraft-gpu`, whose worker sees this same folder."""
    retries: int = Field(default=3, ge=0, le=20)
    """Tries after the first one, only for a busy stage or a service that does not answer; nothing else is retried."""
    retry_delay: float = Field(default=10.0, ge=0, le=3_600)
    """Seconds before the first retry; each later one waits twice as long."""
    pool_patience: PositiveInt = 600
    """Seconds that a stage may wait for a worker of `regraft-gpu` before the retraining fails and says so."""
    decide: Decide = Decide()
    """When new data is worth a training; changed parameters always are."""
    settle: float = Field(default=5.0, ge=0, le=3_600)
    """Seconds that a file of `data/raw` must be unchanged before `watch` reports it: half a copy is not data."""
    timeouts: Timeouts = Timeouts()
    """Seconds for each step."""
