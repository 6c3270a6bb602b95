"""`python -m regraft.train`: the stage as a process."""

import importlib
import logging
import sys

from pydantic import BaseModel

from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.params import load_sections
from regraft.stage import run_stage
from regraft.train import crew
from regraft.train.params import TrainParams


class Sections(BaseModel):
    """The sections of `params.yaml` that this stage reads."""

    model: ModelParams
    train: TrainParams


def body(sections: Sections, layout: Layout) -> None:
    """Train the adapter."""
    # By name: the plan decides whether a training starts, never what it makes, so its code is no dep of the stage.
    plan = importlib.import_module("regraft.plan.check")
    expected = plan.before(sections.train, sections.model, layout)
    if sections.train.processes > 1:
        crew.train_together("regraft.train", sections.train.processes)
        return  # what this process used is not what its members did
    run(sections, layout)
    plan.after(expected, layout)


def run(sections: Sections, layout: Layout) -> None:
    """Train in this process, alone or with others."""
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


def member() -> int:
    """Be one of several processes that train together."""
    logging.basicConfig(level=logging.INFO if crew.is_first() else logging.WARNING, format="%(message)s")
    layout = Layout()
    return crew.run_member(lambda: run(load_sections(layout.params, Sections), layout))


if __name__ == "__main__":
    sys.exit(member() if crew.is_member() else run_stage("train", Sections, body))
