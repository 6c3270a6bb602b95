"""`python -m regraft.validate`: the stage as a process."""

import sys
import time

from pydantic import ConfigDict, Field

from regraft.artifacts import write_json
from regraft.layout import Layout
from regraft.params import Section
from regraft.stage import run_stage
from regraft.validate.params import ClonedDataParams, ValidateParams
from regraft.validate.validate import validate


class Sections(Section):
    """What the stage reads of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_by_name=True)

    data: ClonedDataParams
    validate_: ValidateParams = Field(alias="validate")


def body(sections: Sections, layout: Layout) -> None:
    """Run the stage at its place in the clone."""
    started = time.monotonic()
    report = validate(
        sections.validate_,
        sections.data,
        raw_root=layout.root,
        out=layout.stage("validate"),
        docs=layout.docs,
    )
    seconds = time.monotonic() - started
    write_json(layout.measurements("validate"), {"seconds": round(seconds, 2), "rows": report.rows_in})


if __name__ == "__main__":
    sys.exit(run_stage("validate", Sections, body))
