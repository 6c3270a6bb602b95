"""The command `regraft plan`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regraft import cli, settings
from regraft.layout import Layout
from regraft.plan import cards

ROOT = Path(__file__).parent.parent.parent
EXAONE = {
    "model_type": "exaone4", "vocab_size": 102400, "hidden_size": 2560, "intermediate_size": 7168,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped parameters in a folder that passes for a clone, on a machine without a card."""
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setattr(cards, "present_card", lambda: None)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "exaone.json").write_text(json.dumps(EXAONE))
    return tmp_path


def told(clone: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    code = cli.run(["plan", "--json", "--root", str(clone), *arguments])
    return {"code": code, **json.loads(capsys.readouterr().out)}


def test_without_a_card_it_says_what_the_parameters_take(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(clone, capsys)
    assert (found["code"], found["model"]["family"], found["setup"]["length"]) == (0, "llama", 128)
    assert found["predicted"]["total"] == found["expected"] > 0
    assert "fit" not in found


def test_a_model_and_a_card_give_the_fastest_that_fits(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(clone, capsys, "--model", str(clone / "exaone.json"), "--length", "1024", "--gpu", "rtx3050-6gb")
    assert found["fit"]["fits"]
    assert found["fit"]["expected"] <= found["card"]["limit"] < 6 * 2**30
    assert found["fit"]["settings"]["train.batch_size"] < 16
    assert found["model"]["parameters"] == 2_405_332_160


def test_apply_writes_what_fits_and_the_plan_of_it_fits(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", str(clone / "exaone.json"), "--vram", "6GiB")
    first = told(clone, capsys, *arguments, "--length", "1024", "--apply")
    assert settings.load(Layout(clone)).train.gradient_checkpointing
    again = told(clone, capsys, *arguments, "--length", str(first["setup"]["length"]))
    assert again["expected"] == first["fit"]["expected"]


def test_what_cannot_fit_ends_with_1_and_writes_nothing(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (clone / "params.yaml").read_bytes()
    found = told(clone, capsys, "--model", str(clone / "exaone.json"), "--vram", "1GiB", "--apply")
    assert (found["code"], found["fit"]["fits"]) == (1, False)
    assert (clone / "params.yaml").read_bytes() == before


def test_the_tables_are_shown_for_people(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--compare", "--vram", "8GiB", "--root", str(clone)]) == 0
    shown = capsys.readouterr().out
    for expected in ("QLoRA, NF4, checkpointing", "trained parameters / MiB", "On 8 GiB (7,782 MiB to use):", "fits"):
        assert expected in shown


@pytest.mark.parametrize(
    "arguments", [["--apply"], ["--gpu", "t4", "--vram", "4GiB"], ["--vram", "much"], ["--gpu", "x"]]
)
def test_wrong_usage_ends_with_2(clone: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--root", str(clone), *arguments]) == 2
    assert "next: " in capsys.readouterr().err or arguments[0] == "--vram"


def test_a_plan_loads_no_heavy_library(clone: Path) -> None:
    heavy = ["torch", "transformers", "peft", "bitsandbytes", "numpy", "mlflow", "prefect", "huggingface_hub"]
    code = (
        "import sys\nfrom regraft.cli import run\n"
        f"assert run(['plan', '--vram', '6GiB', '--compare', '--root', {str(clone)!r}]) == 0\n"
        f"print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
