"""dvc.yaml, versions.yaml, params.yaml and the code say the same."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from tiny import load_infra

from regraft import pipeline, settings
from regraft.layout import STAGES, Layout

ROOT = Path(__file__).parent.parent.parent
DVC = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
PARAMS = YAML(typ="safe").load(ROOT / "params.yaml")


def test_the_stages_are_the_ones_of_the_layout_each_with_its_package_command_and_output() -> None:
    assert tuple(DVC) == STAGES
    for stage, entry in DVC.items():
        assert entry["cmd"] == f"python -m regraft.{stage}"
        assert entry["outs"] == [f"data/work/{stage}"]
        assert (ROOT / f"regraft/{stage}/__main__.py").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_code_deps_are_its_import_closure(stage: str) -> None:
    listed = [dep for dep in DVC[stage]["deps"] if dep.startswith("regraft/")]
    assert listed == load_infra("closure").stage_code(stage), "run `python infra/closure.py --write`"


def test_the_closure_that_python_loads_is_within_the_one_that_is_listed() -> None:
    code = (
        "import importlib, json, sys\nimportlib.import_module('regraft.validate.__main__')\n"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.startswith('regraft')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(p).relative_to(ROOT).as_posix() for p in json.loads(done.stdout)}
    assert loaded <= set(DVC["validate"]["deps"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_sections_that_a_stage_reads_are_the_parameters_that_dvc_watches(stage: str) -> None:
    watched = {str(p).split(".")[0] for p in DVC[stage]["params"] if isinstance(p, str)}
    tree = ast.parse((ROOT / f"regraft/{stage}/__main__.py").read_text())
    fields = {
        (node.target.id).rstrip("_")
        for found in ast.walk(tree)
        if isinstance(found, ast.ClassDef)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert fields == watched


def test_what_runs_before_a_stage_is_what_its_data_deps_say() -> None:
    for stage, entry in DVC.items():
        direct = {Path(dep).parts[2] for dep in entry["deps"] if dep.startswith("data/work/")}
        upstream = set(direct)
        for name in direct:
            upstream |= set(pipeline.UPSTREAM[name])
        assert upstream == set(pipeline.UPSTREAM[stage])


def test_no_stage_depends_on_measurements_docs_or_outcomes() -> None:
    for entry in DVC.values():
        for dep in entry["deps"]:
            assert not re.match(r"data/work/(measurements|docs|outcomes|locks|verdict)", dep)


def test_versions_yaml_is_made_from_the_lock() -> None:
    assert (ROOT / "versions.yaml").read_text() == load_infra("versions").render(), "run `make lock`"


def test_the_shipped_params_are_valid_and_name_every_field_with_a_comment() -> None:
    loaded = settings.load(Layout(ROOT))
    for name, field in settings.Settings.model_fields.items():
        section = field.alias or name
        given, known = set(PARAMS[section]), set(type(getattr(loaded, name)).model_fields)
        known = {known_field.rstrip("_") for known_field in known}
        assert given == known, f"params.yaml's section {section}"
    for line in (ROOT / "params.yaml").read_text().splitlines():
        if re.match(r"^  \w+: \S", line):
            assert "#" in line, f"say why: {line}"


def test_the_lock_has_hashes_and_no_addresses() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[a-z0-9._-]+==", lock, flags=re.MULTILINE)
    assert len(pins) > 100
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", lock)) >= len(pins)
    assert "://" not in lock
