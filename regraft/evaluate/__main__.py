"""`python -m regraft.evaluate`: the stage. `python -m regraft.evaluate score --adapter DIR --out DIR`: one adapter."""

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel

from regraft.evaluate.evaluate import evaluate, score
from regraft.evaluate.params import EvaluateParams
from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.stage import run_stage


class Sections(BaseModel):
    """What the stage reads of `params.yaml`."""

    model: ModelParams
    evaluate: EvaluateParams


def body(sections: Sections, layout: Layout) -> object:
    """Score the base and the challenger."""
    return evaluate(
        sections.evaluate,
        sections.model.quantization,
        base=layout.stage("model"),
        dataset=layout.stage("preprocess"),
        adapters={"challenger": layout.stage("train") / "adapter"},
        out=layout.stage("evaluate"),
        attention=sections.model.attention,
        measurements=layout.measurements("evaluate"),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the stage, or score one adapter, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m regraft.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("score", help="score one adapter on the present holdout")
    one.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    one.add_argument("--out", type=Path, required=True, help="the folder to write answers and report into")
    given = parser.parse_args(arguments)
    if given.command is None:
        return run_stage("evaluate", Sections, body)

    def score_one(sections: Sections, layout: Layout) -> object:
        return score(
            sections.evaluate,
            sections.model.quantization,
            base=layout.stage("model"),
            dataset=layout.stage("preprocess"),
            adapter=given.adapter,
            out=given.out,
            attention=sections.model.attention,
        )

    return run_stage("score", Sections, score_one)


if __name__ == "__main__":
    sys.exit(main())
