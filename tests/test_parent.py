"""The parent of a warm start: fetched, checked, and written into params.yaml without touching the rest of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from regraft import parent, settings
from regraft.errors import DamagedArtifact, ParamsError
from regraft.layout import Layout
from regraft.model.check import adapter_digest

ROOT = Path(__file__).parent.parent


def _adapter(folder: Path) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{key}A.weight": np.ones((2, 8), "f4"), f"{key}B.weight": np.ones((8, 2), "f4")}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A clone whose registry has one version."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    source = _adapter(tmp_path / "registry/adapter").parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parent, "version", lambda *_: SimpleNamespace(number=7, identity="ab" * 32))
    monkeypatch.setattr(parent, "fetch", lambda _, to: shutil.copytree(source, to, dirs_exist_ok=True))
    return Layout()


def test_the_parent_and_its_digest_are_written_and_every_other_line_stays(layout: Layout) -> None:
    before = (ROOT / "params.yaml").read_text().splitlines()
    done = parent.set_parent(layout, settings.load(layout), "champion")

    assert done.number == 7
    assert done.adapter == "data/parents/abababababababab/adapter"
    assert done.digest == adapter_digest(Path(done.adapter))
    after = layout.params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in changed] == [
        f"parent: {done.adapter}",
        f"parent_digest: {done.digest}",
    ]
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in changed)
    loaded = settings.load(layout).train
    assert (loaded.parent, loaded.parent_digest) == (done.adapter, done.digest)


def test_a_fresh_start_brings_the_file_back_as_it_was(layout: Layout) -> None:
    parent.set_parent(layout, settings.load(layout), "champion")
    assert parent.set_parent(layout, settings.load(layout), None) == parent.Parent(None, None, None)
    loaded = settings.load(layout).train
    assert (loaded.parent, loaded.parent_digest) == (None, None)


def test_a_version_that_may_not_be_loaded_is_no_parent(layout: Layout) -> None:
    (layout.params.parent / "registry/adapter/adapter_model.bin").write_bytes(b"pickle")
    before = layout.params.read_bytes()

    with pytest.raises(DamagedArtifact, match=r"adapter_model\.bin"):
        parent.set_parent(layout, settings.load(layout), "champion")
    assert layout.params.read_bytes() == before


@pytest.mark.parametrize(
    "line", ["parent:", "parent: ", "parent: # a person's", "parent:   null", "parent: null  # a person's"]
)
def test_a_line_with_no_value_gets_one_and_its_comment_stays(tmp_path: Path, line: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"data:\n  parent: x\ntrain:\n  parent_digest: null\n  {line}\n  rank: 4\n")
    parent.write_values(file, "train", {"parent": "a/b"})
    data, train = file.read_text().split("train:\n")
    assert data == "data:\n  parent: x\n"
    digest, written, rank = train.splitlines()
    assert (digest, rank) == ("  parent_digest: null", "  rank: 4")
    assert written.partition("#")[0].split() == ["parent:", "a/b"]
    assert written.partition("#")[2] == line.partition("#")[2]


def test_a_file_without_a_line_for_it_is_left_alone(layout: Layout) -> None:
    lines = [line for line in layout.params.read_text().splitlines() if not line.startswith("  parent: ")]
    layout.params.write_text("\n".join(lines) + "\n")

    with pytest.raises(ParamsError, match=r"train\.parent has no line"):
        parent.set_parent(layout, settings.load(layout), None)
