"""`python -m regraft.train`: the stage as a process."""

import importlib
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

    # By name: the plan decides whether a training starts, never what it makes, so its code is no dep of the stage.
    plan = importlib.import_module("regraft.plan.check")
    expected = plan.before(sections.train, sections.model, layout)
    train(
        sections.train,
        sections.model,
        base=layout.stage("model"),
        dataset=layout.stage("preprocess"),
        out=layout.stage("train"),
        checkpoints=layout.checkpoints,
        measurements=layout.measurements("train"),
    )
    plan.after(expected, layout)


if __name__ == "__main__":
    sys.exit(run_stage("train", Sections, body))
