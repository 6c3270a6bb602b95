"""The stage as a process, as DVC starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARAMS = "data:\n  layout: prompt_answer\n  prompt: '{%s}'\n  answer: '{category}'\nvalidate: {}\n"


def start(root: Path, code: str = "import runpy; runpy.run_module('regraft.validate', run_name='__main__')") -> Any:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ.copy(), capture_output=True, text=True, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/a.csv").write_text("text,category\nwhere is it?,tracking\n")
    (tmp_path / "params.yaml").write_text(PARAMS % "text")
    return tmp_path


def test_the_stage_writes_its_outputs_and_loads_no_torch(clone: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('regraft.validate', run_name='__main__')\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect', 'posthog'} & set(sys.modules)\n"
        "print(code, sorted(heavy), 'great_expectations' in sys.modules)\n"
    )
    done = start(clone, code)
    assert done.stdout == "0 [] True\n"
    assert done.stderr == "1 rows read, 1 accepted, 0 quarantined, 0 duplicates\n"
    report = json.loads((clone / "data/work/validate/report.json").read_text())
    assert report["files"]["data/raw/a.csv"]["rows"] == 1
    assert (clone / "data/work/docs/index.html").is_file()
    assert json.loads((clone / "data/work/measurements/validate.json").read_text())["rows"] == 1


def test_params_and_report_load_nothing_heavy() -> None:
    code = (
        "import sys, regraft.validate.params, regraft.validate.report\n"
        "print(sorted({'pyarrow', 'pandas', 'great_expectations', 'torch'} & set(sys.modules)))"
    )
    assert start(Path(), code).stdout == "[]\n"


def test_a_wrong_column_name_ends_with_code_2_and_no_traceback(clone: Path) -> None:
    (clone / "params.yaml").write_text(PARAMS % "txt")
    done = start(clone)
    assert done.returncode == 2
    assert done.stderr == (
        "validate: data.prompt names the column `txt`, which is in no file; did you mean `text`?\n"
        "  columns found: category, text\n"
        "  next: edit section `data` of params.yaml\n"
    )
    assert json.loads((clone / "data/work/outcomes/validate.json").read_text())["exit_code"] == 2


def test_refused_data_ends_with_code_3_and_an_empty_folder_with_code_1(clone: Path) -> None:
    (clone / "data/raw/a.csv").write_text("text,category\n,tracking\n")
    assert start(clone).returncode == 3
    (clone / "data/raw/a.csv").unlink()
    done = start(clone)
    assert done.returncode == 1
    assert done.stderr.startswith("validate: there is no data file in data/raw\n  next: put .jsonl")
