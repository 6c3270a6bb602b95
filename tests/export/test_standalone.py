"""`regraft merge` and `regraft verify`: any adapter, whole or not at all, resumed shard by shard."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small

from regraft.cli import run
from regraft.errors import DamagedArtifact, ParamsError, PinMismatch, RegraftError
from regraft.export import standalone
from regraft.export.standalone import merge_adapter, verify_merge


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of several shards and an adapter; read them, don't write into them."""
    root = tmp_path_factory.mktemp("pair")
    base = small.make_llama(root / "base", shard="40KB")
    return base, small.make_adapter(base, root / "adapter")


def test_the_command_merges_and_verifies_and_sha256sum_agrees(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    out = tmp_path / "out"

    assert run(["merge", str(base), str(adapter), "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert run(["verify", str(out)]) == 0
    assert "is whole: a merge of adapter" in capsys.readouterr().out

    assert {each["name"] for each in record["survival"]} == {
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert all(each["cosine"] > 0.999 and abs(each["norm"] - 1) < 0.01 for each in record["survival"])
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_merge_killed_after_a_shard_goes_on_from_there_to_the_same_bytes(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "whole")
    command = [sys.executable, "-m", "regraft", "merge", str(base), str(adapter), "--out", str(tmp_path / "out")]

    killed = subprocess.run(
        command, env={**os.environ, "REGRAFT_FAILPOINT": "export.shard@3"}, capture_output=True, check=False
    )
    kept = sorted(path.name for path in (tmp_path / ".out.merging/shards").glob("*.safetensors"))
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    assert len(kept) == 2

    again = subprocess.run(command, capture_output=True, text=True, check=True)

    assert again.stderr.count("was merged before") == 2
    assert small.contents(tmp_path / "out") == small.contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "point",
    [
        *(
            "export.shard",
            "export.shard@2",
            "export.merge",
            "export.merge@4",
            "write_file.fsync",
            "write_file.replace@2",
        ),
        *("commit_dir.written", "commit_dir.manifest", "commit_dir.sealed", "commit_dir.placed", "commit_dir.done"),
    ],
)
def test_a_merge_killed_anywhere_and_run_again_has_the_same_bytes(
    pair: tuple[Path, Path], tmp_path: Path, point: str
) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "whole")
    command = [sys.executable, "-m", "regraft", "merge", str(base), str(adapter), "--out", str(tmp_path / "out")]

    killed = subprocess.run(command, env={**os.environ, "REGRAFT_FAILPOINT": point}, capture_output=True, check=False)
    subprocess.run(command, capture_output=True, check=True)

    assert killed.returncode == -9
    assert small.contents(tmp_path / "out") == small.contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_shard_that_was_damaged_between_two_attempts_is_made_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "whole")
    monkeypatch.setenv("REGRAFT_FAILPOINT", "export.shard@3=ENOSPC")
    with pytest.raises(RegraftError, match="is full"):
        merge_adapter(base, adapter, tmp_path / "out")
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    first = min((tmp_path / ".out.merging/shards").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")

    merge_adapter(base, adapter, tmp_path / "out")

    assert small.contents(tmp_path / "out") == small.contents(tmp_path / "whole")


def test_a_failed_merge_leaves_the_earlier_one_untouched(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "out")
    before = small.contents(tmp_path / "out")

    monkeypatch.setattr(standalone.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RegraftError, match=r"the merge needs 0\.3 MB .* 0\.0 MB are free"):
        merge_adapter(base, adapter, tmp_path / "out", dtype="fp32")
    assert not (tmp_path / ".out.merging").exists()
    monkeypatch.undo()
    monkeypatch.setenv("REGRAFT_FAILPOINT", "commit_dir.manifest=ENOSPC")
    with pytest.raises(RegraftError, match="is full"):
        merge_adapter(base, adapter, tmp_path / "out", dtype="fp32")

    assert small.contents(tmp_path / "out") == before


def test_a_base_with_another_byte_than_named_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    digests = merge_adapter(base, adapter, tmp_path / "out").base
    before = small.contents(tmp_path / "out")
    flipped = shutil.copytree(base, tmp_path / "flipped")
    file = min(flipped.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)

    with pytest.raises(PinMismatch, match=rf"is not the base that was named: {file.name} has [0-9a-f]{{64}}, expected"):
        merge_adapter(flipped, adapter, tmp_path / "out", base_digests=digests)
    assert small.contents(tmp_path / "out") == before


def test_a_folder_that_is_no_earlier_merge_is_never_replaced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("Hello")

    with pytest.raises(ParamsError, match="holds something that is no earlier merge"):
        merge_adapter(base, adapter, tmp_path / "letters")
    with pytest.raises(ParamsError, match="would replace what is to be merged"):
        merge_adapter(base, adapter, base.parent)
    assert (tmp_path / "letters/dear.txt").read_text() == "Hello"


def test_an_adapter_that_changes_nothing_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = pair
    zero = shutil.copytree(adapter, tmp_path / "zero")
    factors = load_file(zero / "adapter_model.safetensors")
    save_file(
        {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in factors.items()},
        zero / "adapter_model.safetensors",
    )

    with pytest.raises(DamagedArtifact, match="B is zero in every layer"):
        merge_adapter(base, zero, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    import tiny

    base = tiny.make_base(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    tiny.make_tokenizer(vocabulary=404).save_pretrained(adapter)
    tokenizer = json.loads((adapter / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 9000, "content": "<|more|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(DamagedArtifact, match=r"the tokenizer has a token 9000, the embedding has [0-9]+ rows"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_the_tokenizer_that_lies_with_the_adapter_goes_with_the_merge(tmp_path: Path) -> None:
    import tiny

    base = tiny.make_base(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")

    merge_adapter(base, adapter, tmp_path / "out")

    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_any_byte_that_is_flipped_in_a_merge_is_found_offline(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merge_adapter(base, adapter, tmp_path / "out")

    for path in sorted((tmp_path / "out").iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(DamagedArtifact):
            verify_merge(tmp_path / "out")
        path.write_bytes(data)
    assert verify_merge(tmp_path / "out").adapters[0].name == "adapter"


def test_a_pickled_adapter_is_refused_unread(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    pickled: Any = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")

    with pytest.raises(DamagedArtifact, match=r"adapter_model\.bin, a pickle that can run code"):
        merge_adapter(base, pickled, tmp_path / "out")


def test_a_reference_to_code_is_not_carried_on(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))

    merge_adapter(base, adapter, tmp_path / "out")

    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_bytes())
