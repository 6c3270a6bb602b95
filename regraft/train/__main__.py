"""`python -m regraft.train`: the stage as a process."""

import sys

from pydantic import BaseModel

from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.stage import run_stage
from regraft.train.params import TrainParams


class Sections(BaseModel):
    """The sections of `params.yaml` that this stage reads."""

    model: ModelParams
    train: TrainParams


def body(sections: Sections, layout: Layout) -> None:
    """Train the adapter."""
    from regraft.train.trainer import train

    train(
        sections.train,
        sections.model,
        base=layout.stage("model"),
        dataset=layout.stage("preprocess"),
        out=layout.stage("train"),
        checkpoints=layout.checkpoints,
        measurements=layout.measurements("train"),
    )


if __name__ == "__main__":
    sys.exit(run_stage("train", Sections, body))
