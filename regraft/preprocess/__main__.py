"""`python -m regraft.preprocess`: the stage as a process."""

import sys
import time

from regraft.preprocess.malloc import keep_small_blocks

if __name__ == "__main__":
    keep_small_blocks()

from pydantic import BaseModel

from regraft.artifacts import write_json
from regraft.layout import Layout
from regraft.preprocess.params import PreprocessParams
from regraft.stage import run_stage


class Sections(BaseModel):
    """The section of `params.yaml` that this stage reads."""

    preprocess: PreprocessParams


def body(sections: Sections, layout: Layout) -> None:
    """Prepare what `validate` accepted."""
    from regraft.preprocess.preprocess import preprocess
    from regraft.preprocess.twins import sweep

    started = time.monotonic()
    base, rows, out = (layout.stage(name) for name in ("model", "validate", "preprocess"))
    cache = layout.cache("preprocess")
    sweep(cache)
    report = preprocess(sections.preprocess, base=base, rows=rows, out=out, cache=cache, root=layout.root)
    seconds = time.monotonic() - started
    measured = {"seconds": round(seconds, 2), "rows_per_second": round(report.counts.rows_in / seconds, 1)}
    write_json(layout.measurements("preprocess"), measured)


if __name__ == "__main__":
    sys.exit(run_stage("preprocess", Sections, body))
