"""`python -m regraft.model`: the stage as a process."""

import sys
from pathlib import Path

from pydantic import BaseModel

from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.stage import run_stage

CORPUS = Path("data/shipped/corpus.txt")


class Sections(BaseModel):
    """The sections of `params.yaml` that this stage reads."""

    model: ModelParams


def body(sections: Sections, layout: Layout) -> None:
    """Pin the base model."""
    from regraft.model.pin import pin

    pin(sections.model, corpus=layout.root / CORPUS, out=layout.stage("model"))


if __name__ == "__main__":
    sys.exit(run_stage("model", Sections, body))
