"""The command `regraft inspect`."""

import json
from pathlib import Path

import pytest
from tiny import make_base

from regraft import cli


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a B that is not zero."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from regraft.model.adapter import attach, save_adapter

    model = attach(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(model, folder, base_name="base")
    return folder


def test_a_folder_is_inspected_anywhere_with_a_base_a_picture_and_json(
    trained: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(trained), "--base", str(tiny_base), "--picture", "seen.png"]
    assert cli.run(["inspect", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["rank"] for layer in found["layers"]] == [4, 4]
    assert all(layer["relative"] > 0 for layer in found["layers"])
    assert Path(found["picture"]) == tmp_path / "seen.png"
    assert (tmp_path / "seen.png").is_file()
    assert cli.run(["inspect", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_proj" in shown
    assert "suggested rank: " in shown


def test_the_clones_own_base_is_used_where_it_fits_and_passed_over_aloud_where_it_does_not(
    trained: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(tiny_base, tmp_path / "fits/data/work/model/weights")
    make_base(tmp_path / "other/data/work/model/weights", hidden=128)
    assert cli.run(["inspect", str(trained), "--json", "--root", str(tmp_path / "fits")]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["relative"] > 0
    assert cli.run(["inspect", str(trained), "--json", "--root", str(tmp_path / "other")]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["layers"][0]["relative"] is None
    assert "the clone's base is not this adapter's" in told.err


def test_an_adapter_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "is missing" in capsys.readouterr().err
