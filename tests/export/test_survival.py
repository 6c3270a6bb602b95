"""What a merge says of its own change, against float64; and the digests that it takes beside its work."""

from pathlib import Path
from typing import Any

import pytest
import small

from regraft.artifacts import digest_file
from regraft.export import beside
from regraft.export import tensors as storage
from regraft.export.beside import digests_beside
from regraft.export.merge import merge, plan_merge
from regraft.export.survival import Survival


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_change_that_survives_a_merge_is_measured_as_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dora: bool
) -> None:
    import torch

    monkeypatch.setattr(storage.Reader.blocks, "__defaults__", (7 * 64,))
    targets: dict[str, Any]
    if architecture == "gpt2":
        base = small.make_gpt2(tmp_path / "base", dtype="float32")
        targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    else:
        base = small.make_llama(tmp_path / "base", dtype="float32")
        targets = {"target_modules": ["q_proj", "down_proj"]}
    adapter = small.make_adapter(base, tmp_path / "adapter", use_dora=dora, **targets)
    exact = small.tensors(tmp_path / "base")
    summed = small.peft_merged(base, adapter)
    survival = Survival()
    (tmp_path / "out").mkdir()

    merge(plan_merge(base, adapter, "bf16"), tmp_path / "out", survival=survival)

    stored = small.tensors(tmp_path / "out")
    assert len(survival.layers) == {"llama": 4, "gpt2": 6}[architecture]
    for layer in survival.layers:
        before = exact[layer.name].double()
        intended, effective = summed[layer.name].double() - before, stored[layer.name].double() - before
        found = torch.tensor([layer.cosine, layer.norm, layer.relative, layer.size], dtype=torch.float64)
        expected = torch.stack(
            [
                (intended * effective).sum() / intended.norm() / effective.norm(),
                effective.norm() / intended.norm(),
                intended.norm() / before.norm(),
                intended.norm(),
            ]
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_the_size_of_a_change_of_fused_experts_is_that_of_all_of_them(tmp_path: Path, architecture: str) -> None:
    base = small.make_model(architecture, tmp_path / "base", dtype="float32")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=experts)
    exact = small.tensors(tmp_path / "base")
    survival = Survival()
    (tmp_path / "out").mkdir()

    merge(plan_merge(base, adapter, "own"), tmp_path / "out", survival=survival)

    stored = small.tensors(tmp_path / "out")
    assert survival.layers
    for layer in survival.layers:
        change = stored[layer.name].double() - exact[layer.name].double()
        assert layer.size == pytest.approx(float(change.norm()), rel=1e-5)


def test_digests_taken_beside_are_those_of_the_files(tmp_path: Path) -> None:
    for name, content in (("a file", b"a"), ("empty", b""), ("long", b"0123456789" * 100_000)):
        (tmp_path / name).write_bytes(content)

    with digests_beside(tmp_path, ["a file", "empty", "long"]) as digests:
        found = digests()

    assert found == {name: digest_file(tmp_path / name) for name in ("a file", "empty", "long")}


def test_where_the_other_process_fails_the_files_are_digested_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(beside, "_DIGEST", "raise SystemExit(1)")

    with digests_beside(tmp_path, ["file"]) as digests:
        assert digests() == {"file": digest_file(tmp_path / "file")}
    with digests_beside(tmp_path, ["missing"]) as digests, pytest.raises(FileNotFoundError, match="missing"):
        digests()
