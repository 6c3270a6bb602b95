"""`python -m regraft.train`: the stage as a process."""

import os
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
    # Read when torch loads OpenMP: threads that wait sleep, instead of spinning on a core that another process needs.
    # With two threads on two busy cores, spinning made a step nine times slower; the results are the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run_stage("train", Sections, body))
