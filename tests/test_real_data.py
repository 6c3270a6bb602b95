"""From `validate` to `evaluate` on real public data, through column mapping in `params.yaml` alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_clone
from ruamel.yaml import YAML

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
README = next(
    block
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if "{text}" in block
)
FROM_README: dict[str, Any] = YAML(typ="safe").load(README)
QUICK: dict[str, Any] = {"train": {"max_steps": 12}, "evaluate": {"max_rows": 48, "max_new_tokens": 8}}
BANKING77: dict[str, Any] = {**FROM_README, "preprocess": {**FROM_README["preprocess"], "max_length": 512}}
"""The small clone's tokenizer needs more tokens for a text than a real one."""
GSM8K: dict[str, Any] = {
    **FROM_README,
    "data": {**FROM_README["data"], "prompt": "{question}", "answer": "{answer}", "slices": []},
    "preprocess": {"max_length": 1024, "holdout": FROM_README["preprocess"]["holdout"], "max_dropped_share": 0.2},
    "model": {"standin": {"context_length": 1024}},
}


@pytest.mark.parametrize(
    ("name", "rows", "params", "slices"),
    [("banking77/train.csv", 10_003, BANKING77, 77), ("gsm8k/train.jsonl", 7_473, GSM8K, 0)],
)
def test_a_public_data_set_goes_from_validation_to_evaluation_without_code(
    name: str, rows: int, params: dict[str, Any], slices: int, shared: Path, tmp_path: Path
) -> None:
    clone = small_clone.small_clone(tmp_path / "clone")
    (clone / "data/raw/first.jsonl").unlink()
    shutil.copyfile(shared / "data" / name, clone / "data/raw" / Path(name).name)
    small_clone.set_params(clone, params)
    small_clone.set_params(clone, QUICK)
    done = subprocess.run(
        [Path(sys.executable).parent / "dvc", "repro", "evaluate"],
        cwd=clone,
        env={
            **os.environ,
            "PYTHONPATH": str(clone),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = {
        stage: json.loads((clone / f"data/work/{stage}/report.json").read_text())
        for stage in ("validate", "preprocess", "evaluate")
    }
    assert reports["validate"]["rows_in"] == rows
    assert reports["validate"]["rows_in"] == reports["validate"]["rows_out"] + reports["validate"]["rows_quarantined"]
    counts = reports["preprocess"]["counts"]
    assert counts["rows_in"] == reports["validate"]["rows_out"] == sum(counts.values()) - counts["rows_in"]
    assert counts["holdout"] > rows * 0.08
    assert reports["evaluate"]["scores"]["challenger"]["overall"]["rows"] == 48
    assert len(reports["validate"]["slices"].get("category", {})) == slices
