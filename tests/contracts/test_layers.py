"""Imports go one way, heavy libraries stay where they compute, and importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import load_infra

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(p for package in ("regraft", "tasks", "flows") for p in (ROOT / package).rglob("*.py"))
BARE_HOST = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "pydantic", "pydantic_core", "typing_extensions",
             "pyarrow", "numpy", "safetensors", "tokenizers", "accelerate", "psutil", "huggingface_hub", "jinja2"}  # fmt: skip
"""What a bare GPU host has: the five that the design names and what those bring along."""


def imports(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, at import time or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_layer_imports_only_what_it_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = imports(path)
    if name.startswith("regraft/"):
        assert not found & {"tasks", "flows"}, "regraft knows nothing of who calls it"
    if name.startswith("tasks/"):
        assert "flows" not in found
    if not name.startswith(("tasks/", "flows/")):
        assert "prefect" not in found, "only tasks/ and flows/ import prefect"
    if not (name.startswith("regraft/register/") or name == "regraft/tracking.py"):
        assert "mlflow" not in found, "only regraft/register/ and regraft/tracking.py import mlflow"
    if not name.startswith("regraft/validate/"):
        assert "great_expectations" not in found, "only regraft/validate/ imports great_expectations"


@pytest.mark.parametrize("stage", ["model", "train", "evaluate", "export"])
def test_a_stage_for_a_bare_gpu_host_needs_nothing_else(stage: str) -> None:
    tool = load_infra("closure")
    foreign = {}
    for name in tool.stage_code(stage):
        beyond = {n for n in imports(ROOT / name) if n not in sys.stdlib_module_names} - BARE_HOST - {"regraft"}
        if name == "regraft/params.py":
            beyond -= {"ruamel"}  # reads params.yaml, which a bare host gets as arguments
        if name == "regraft/export/llama.py":
            beyond -= {"llama_cpp"}  # reads a GGUF form; where it is not there, that form is refused
        if name in ("regraft/export/genai.py", "regraft/export/onnx.py"):
            beyond -= {"onnxruntime"}  # the forms of ONNX; without the extra they are refused
        if name == "regraft/export/signature.py":
            beyond -= {"cryptography"}  # only where a key is named; without it, that is refused
        if name == "regraft/train/preference.py":
            beyond -= {"trl"}  # loaded for the objectives dpo, orpo and kto only; without it, they are refused
        if beyond:
            foreign[name] = beyond
    assert foreign == {}


def test_importing_the_package_and_its_light_modules_loads_nothing_heavy_and_makes_nothing(tmp_path: Path) -> None:
    light = ["regraft", "regraft.cli", "regraft.settings", "regraft.pipeline", "regraft.retrain", "flows.cli"]
    heavy = ["torch", "transformers", "peft", "bitsandbytes", "mlflow", "prefect", "great_expectations", "pandas", "matplotlib",
             "datasets", "dvc", "pyarrow", "numpy"]  # fmt: skip
    code = f"import sys\nfor name in {light}: __import__(name)\nprint(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_has_a_docstring_and_at_most_400_lines(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "say what it is for"
    assert len(text.splitlines()) <= 400, "split by responsibility"
