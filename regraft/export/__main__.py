"""`python -m regraft.export --adapter DIR --lineage FILE --identity HEX`: the export as a process of its own."""

import argparse
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from regraft.artifacts import read_json, write_json
from regraft.errors import DamagedArtifact
from regraft.evaluate.params import EvaluateParams
from regraft.export.params import ExportParams
from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.stage import run_stage


class Sections(BaseModel):
    """The sections of `params.yaml` that an export reads."""

    model: ModelParams
    evaluate: EvaluateParams
    export: ExportParams


def main(arguments: list[str] | None = None) -> int:
    """Export one version in the present clone, write `data/work/export/report.json`, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m regraft.export", description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--lineage", type=Path, required=True, help="the version's lineage.json")
    parser.add_argument("--identity", required=True, help="the version's identity, 64 hexadecimal digits")
    parser.add_argument(
        "--latest", action=argparse.BooleanOptionalAction, default=True, help="move data/exports/latest to this export"
    )
    parser.add_argument("--champion", help="the champion's identity: its export is never removed to make room")
    given = parser.parse_args(arguments)

    def body(sections: Sections, layout: Layout) -> None:
        from regraft.export.export import export

        lineage = read_json(given.lineage)
        if not isinstance(lineage, dict):
            raise DamagedArtifact(f"{given.lineage} is not a JSON object")
        (layout.stage("export") / "report.json").unlink(missing_ok=True)
        clock = time.monotonic()
        report = export(
            sections.export,
            sections.model.quantization,
            sections.evaluate,
            base=layout.stage("model"),
            adapter=given.adapter,
            dataset=layout.stage("preprocess"),
            lineage=lineage,
            out_root=layout.exports,
            identity=given.identity,
            latest=given.latest,
            champion=given.champion,
            attention=sections.model.attention,
        )
        report.save(layout.stage("export") / "report.json")
        write_json(layout.measurements("export"), {"seconds": round(time.monotonic() - clock, 2)})

    return run_stage("export", Sections, body)


if __name__ == "__main__":
    sys.exit(main())
