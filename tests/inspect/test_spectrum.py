"""Singular values, norms and ranks through the factors, against float64 on the matrices themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.errors import DamagedArtifact, MissingInput
from regraft.inspect.picture import draw
from regraft.inspect.spectrum import ENERGY, inspect, singular_values

RANK = 8


def adapter(folder: Path, base: Path, *, zero: str = "", directions: int = RANK, **config: Any) -> Path:
    """A LoRA of the base's layers whose B has `directions` independent columns; layers named `zero` have none."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from regraft.model.adapter import attach, save_adapter

    model = attach(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "k_proj", "down_proj"], **config),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not (zero and zero in name):
                parameter.normal_()
                parameter[:, directions:] = 0
    save_adapter(model, folder, base_name="base")
    return folder


def changes(folder: Path, scaling: float) -> dict[str, torch.Tensor]:
    """ΔW of every layer, formed, in float64."""
    tensors = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {n: scaling * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in sorted(names)}


@pytest.mark.parametrize(("out", "into", "rank"), [(40, 70, 8), (70, 40, 8), (16, 16, 16), (12, 50, 20), (5, 5, 1)])
def test_the_singular_values_are_those_of_the_product(out: int, into: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(out)
    b = torch.randn(out, rank, dtype=torch.float64, generator=generator)
    a = torch.randn(rank, into, dtype=torch.float64, generator=generator)
    expected = torch.linalg.svdvals(-2.5 * b @ a)
    found = singular_values(b, a, -2.5)[: len(expected)]
    torch.testing.assert_close(found[: len(expected)], expected[: len(found)], rtol=1e-12, atol=1e-12)


def test_the_error_of_the_best_smaller_rank_is_what_eckart_and_young_say(tiny_base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tiny_base)
    formed = changes(folder, 16 / RANK)
    found = inspect(folder)
    assert [layer.name for layer in found.layers] == sorted(formed)
    for layer in found.layers:
        delta = formed[layer.name]
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        assert layer.norm == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-9)
        for k in range(1, RANK + 1):
            best = (u[:, :k] * s[:k]) @ v[:k]
            error = float(torch.linalg.matrix_norm(delta - best) / torch.linalg.matrix_norm(delta))
            assert math.sqrt(max(0.0, 1 - layer.energy[k - 1])) == pytest.approx(error, abs=1e-7)
        assert layer.energy[layer.needed - 1] >= ENERGY
        assert layer.needed == 1 or layer.energy[layer.needed - 2] < ENERGY


def test_the_relative_change_is_over_the_bases_own_norm(tiny_base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tiny_base)
    weights = load_file(tiny_base / "model.safetensors")
    formed = changes(folder, 16 / RANK)
    for layer in inspect(folder, tiny_base).layers:
        ratio = formed[layer.name].norm() / weights[f"{layer.name}.weight"].double().norm()
        assert layer.relative == pytest.approx(float(ratio), rel=1e-9)


def test_rslora_and_patterns_scale_each_layer_as_peft_does(tiny_base: Path, tmp_path: Path) -> None:
    plain = {x.name: x for x in inspect(adapter(tmp_path / "plain", tiny_base)).layers}
    other = adapter(tmp_path / "other", tiny_base, use_rslora=True, alpha_pattern={"q_proj": 4})
    for layer in inspect(other).layers:
        alpha = 4 if layer.name.endswith("q_proj") else 16
        assert layer.scaling == pytest.approx(alpha / math.sqrt(RANK))
        assert layer.norm == pytest.approx(plain[layer.name].norm * layer.scaling / plain[layer.name].scaling)


def test_an_adapter_that_used_few_directions_is_told_so(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base, directions=2))
    assert all(layer.needed <= 2 and layer.effective_rank < 2.01 for layer in found.layers)
    assert all(max(layer.singular_values[2:]) < 1e-6 * layer.norm for layer in found.layers)
    assert (found.suggested_rank, found.rank) == (2, RANK)
    assert "rank 2 is enough" in found.why


def test_an_adapter_that_used_all_of_them_may_grow(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base))
    assert found.suggested_rank == 2 * RANK
    assert "the adapter is full" in found.why


def test_a_layer_that_learnt_nothing_is_dead_and_does_not_count(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base, zero="layers.1.self_attn.q_proj", directions=2))
    assert found.dead == ["model.layers.1.self_attn.q_proj"]
    (dead,) = [layer for layer in found.layers if layer.dead]
    assert (dead.norm, dead.effective_rank, dead.needed) == (0, 0, 0)
    assert found.suggested_rank == 2


def test_a_wholly_dead_adapter_gets_no_suggestion(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base, zero="lora_B"))
    assert len(found.dead) == len(found.layers) > 0
    assert found.suggested_rank is None


def test_what_is_besides_the_factors_is_named(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base, use_dora=True))
    assert found.skipped == ["magnitudes (DoRA): what is shown is B·A, before a row's length is set"]


def test_values_that_are_not_finite_and_a_foreign_base_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tiny_base)
    from tiny import make_base

    with pytest.raises(DamagedArtifact, match=r"is \[128, 256\], the adapter is for \[64, 128\]"):
        inspect(folder, make_base(tmp_path / "other", hidden=128))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DamagedArtifact, match="not finite"):
        inspect(folder)
    with pytest.raises(MissingInput):
        inspect(tmp_path / "nowhere")


def test_the_picture_is_a_png_with_something_in_it(tiny_base: Path, tmp_path: Path) -> None:
    found = inspect(adapter(tmp_path / "adapter", tiny_base, zero="layers.1.self_attn.q_proj"), tiny_base)
    for name in ("one.png", "two.png"):
        draw(found, tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
    assert content == (tmp_path / "two.png").read_bytes()
