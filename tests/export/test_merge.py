"""The streaming merge against PEFT's, against float64, and against adapters that it must not touch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.errors import DamagedArtifact, ParamsError
from regraft.export import tensors as storage
from regraft.export.folder import write_companions
from regraft.export.merge import merge, plan_merge


def merged(base: Path, adapter: Path, out: Path, dtype: str = "own") -> dict[str, Any]:
    plan = plan_merge(base, adapter, dtype)
    out.mkdir()
    merge(plan, out)
    write_companions(plan, out, dtype=dtype)
    return small.tensors(out)


def assert_equal(found: dict[str, Any], expected: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    import torch

    assert sorted(found) == sorted(name for name in expected if name not in but)
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert different == []


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5, "down_proj": 40}},
    ],
    ids=["lora", "rslora", "patterns"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_into_16_bits_is_bit_identical_to_pefts(tmp_path: Path, dtype: str, lora: dict[str, Any]) -> None:
    base = small.make_llama(tmp_path / "base", dtype=dtype)
    adapter = small.make_adapter(base, tmp_path / "adapter", **lora)

    assert_equal(merged(base, adapter, tmp_path / "out"), small.peft_merged(base, adapter))


def test_layers_stored_in_by_out_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    base = small.make_gpt2(tmp_path / "base")
    adapter = small.make_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )

    assert_equal(merged(base, adapter, tmp_path / "out"), small.peft_merged(base, adapter), but=("lm_head.weight",))


def test_the_blocks_that_a_tensor_is_merged_in_do_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small.make_llama(tmp_path / "base", shard="20KB")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(storage.Reader.blocks, "__defaults__", (7 * 64,))

    found = merged(base, adapter, tmp_path / "out")

    assert_equal(found, small.peft_merged(base, adapter))
    assert (
        json.loads((tmp_path / "out" / storage.INDEX).read_bytes())["weight_map"]
        == (json.loads((base / storage.INDEX).read_bytes())["weight_map"])
    )


def test_a_merge_is_the_nearest_16_bit_value_of_the_sum_in_float64(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", alpha_pattern={"v_proj": 6})
    factors = load_file(adapter / "adapter_model.safetensors")

    found, before = merged(base, adapter, tmp_path / "out"), small.tensors(base)

    for name, weight in found.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name].double()
        if f"{module}.lora_A.weight" in factors:
            a, b = factors[f"{module}.lora_A.weight"].double(), factors[f"{module}.lora_B.weight"].double()
            expected = expected + (6 if "v_proj" in name else 16) / 8 * (b @ a)
        # The sum in float32 may cross the middle between two 16-bit values, where both are as near to within 1e-6.
        wrong = (weight.double() - expected).abs() > (expected.to(torch.bfloat16).double() - expected).abs() + 1e-6
        assert not wrong.any(), name


def test_an_adapter_on_the_output_of_a_tied_model_unties_it_and_leaves_the_embedding_alone(tmp_path: Path) -> None:
    import torch

    base = small.make_llama(tmp_path / "base", dtype="float32", tied=True)
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"], embeddings=True)
    tokens = torch.arange(40)[None]

    found = merged(base, adapter, tmp_path / "out")

    assert torch.equal(found["model.embed_tokens.weight"], small.tensors(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_bytes())["tie_word_embeddings"] is False
    with torch.no_grad():
        expected = small.adapted(base, adapter)(tokens).logits
        torch.testing.assert_close(small.load(tmp_path / "out")(tokens).logits, expected, atol=2e-5, rtol=1e-4)


def test_an_adapter_on_a_tied_embedding_leaves_the_output_layer_as_it_was(tmp_path: Path) -> None:
    import torch

    base = small.make_llama(tmp_path / "base", dtype="float32", tied=True)
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    tokens = torch.arange(40)[None]

    found = merged(base, adapter, tmp_path / "out")

    assert torch.equal(found["lm_head.weight"], small.tensors(base)["model.embed_tokens.weight"])
    with torch.no_grad():
        expected = small.adapted(base, adapter)(tokens).logits
        torch.testing.assert_close(small.load(tmp_path / "out")(tokens).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_tied_model_stays_tied_when_the_adapter_touches_neither_end(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base", tied=True)
    adapter = small.make_adapter(base, tmp_path / "adapter")

    assert_equal(merged(base, adapter, tmp_path / "out"), small.peft_merged(base, adapter), but=("lm_head.weight",))
    assert json.loads((tmp_path / "out/config.json").read_bytes())["tie_word_embeddings"] is True


def test_every_float_of_the_result_has_the_type_asked_for_and_the_config_says_so(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base", dtype="float32")
    adapter = small.make_adapter(base, tmp_path / "adapter")

    found = merged(base, adapter, tmp_path / "out", dtype="bf16")

    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_bytes())["dtype"] == "bfloat16"


PEAK = """
import json, resource, sys
from pathlib import Path
from regraft.export.merge import merge, plan_merge
base, adapter, out, rows = *map(Path, sys.argv[1:4]), int(sys.argv[4])
entry = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}
header = json.dumps({"model.big.weight": entry}).encode()
with (base / "model.safetensors").open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + rows * 2048)
merge(plan_merge(base, adapter, "bf16"), out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    peaks = []
    for rows in (20_000, 200_000):  # 41 MB and 410 MB
        base, adapter, out = (tmp_path / f"{name}{rows}" for name in ("base", "adapter", "out"))
        for folder in (base, adapter, out):
            folder.mkdir()
        (base / "config.json").write_text("{}")
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        factors = {"lora_A": torch.ones(2, 1024), "lora_B": torch.ones(rows, 2)}
        save_file(
            {f"base_model.model.model.big.{name}.weight": tensor for name, tensor in factors.items()},
            adapter / "adapter_model.safetensors",
        )
        arguments = [sys.executable, "-c", PEAK, str(base), str(adapter), str(out), str(rows)]
        peaks.append(int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout) / 1024)
        shutil.rmtree(out)

    assert peaks[1] - peaks[0] < 30


def test_factors_that_match_no_tensor_are_an_error_that_names_them(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    rename(adapter, ".layers.1.self_attn.", ".layers.9.self_attn.")

    with pytest.raises(
        DamagedArtifact, match=r"model\.layers\.9\.self_attn\.q_proj matches no tensor; model\.layers\.9"
    ):
        plan_merge(base, adapter, "own")


def test_factors_of_another_shape_than_the_base_are_an_error(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(
        small.make_gpt2(tmp_path / "other"), tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True
    )
    rename(adapter, "transformer.h.0.attn.c_attn", "model.layers.0.mlp.up_proj")
    rename(adapter, "transformer.h.1.attn.c_attn", "model.layers.1.mlp.up_proj")

    with pytest.raises(DamagedArtifact, match=r"up_proj is \[96, 64\] in the base and \[192, 64\] in the adapter"):
        plan_merge(base, adapter, "own")


@pytest.mark.parametrize("start", ["olora", "pissa_niter_2"])
def test_an_adapter_that_changed_its_base_before_training_is_refused_by_name(tmp_path: Path, start: str) -> None:
    base = small.make_llama(tmp_path / "base", dtype="float32")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))

    with pytest.raises(ParamsError, match=f"cannot be merged: it has init_lora_weights '{start}'.*path_initial_model"):
        plan_merge(base, adapter, "own")


def test_a_setting_that_nobody_knows_is_refused_by_its_name(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_novelty": {"depth": 2}}))

    with pytest.raises(ParamsError, match="cannot be merged: it has use_novelty"):
        plan_merge(base, adapter, "own")


def test_the_values_that_an_adapter_carries_whole_are_the_ones_that_are_added_to(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = small.make_llama(tmp_path / "base", tied=True)
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"], embeddings=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    before = merged(base, adapter, tmp_path / "before")["lm_head.weight"]
    factors["base_model.model.lm_head.base_layer.weight"][5, 5] += 1
    save_file(factors, adapter / "adapter_model.safetensors")

    after = merged(base, adapter, tmp_path / "after")["lm_head.weight"]

    changed = (before != after).nonzero().tolist()
    assert changed == [[5, 5]]
    torch.testing.assert_close(after[5, 5] - before[5, 5], torch.tensor(1.0, dtype=torch.bfloat16), atol=0.02, rtol=0)


def test_a_sum_that_overflows_is_an_error_and_not_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = small.make_llama(tmp_path / "base", dtype="float16")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e4 for name, tensor in factors.items()}, adapter / "adapter_model.safetensors")

    with pytest.raises(DamagedArtifact, match="is not finite in F16"):
        merged(base, adapter, tmp_path / "out")


def test_weights_stored_under_shorter_names_are_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = small.make_gpt2(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    expected = small.peft_merged(base, adapter)
    stored = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in stored.items()}, base / "model.safetensors")

    found = merged(base, adapter, tmp_path / "out")

    assert_equal({f"transformer.{name}": t for name, t in found.items()}, expected, but=("lm_head.weight",))


def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base", shard="20KB")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "outside.safetensors")
    index = json.loads((base / storage.INDEX).read_bytes())
    index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    (base / storage.INDEX).write_text(json.dumps(index))

    with pytest.raises(DamagedArtifact, match=r"'\.\./outside\.safetensors'"):
        plan_merge(base, adapter, "own")


def rename(adapter: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    factors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in factors.items()}, adapter / "adapter_model.safetensors"
    )


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize(
    ("lora", "untied"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}, False),
    ],
)
def test_tied_embeddings_answer_as_with_the_adapter_whatever_it_does_to_them(
    tmp_path: Path, lora: dict[str, Any], untied: bool
) -> None:
    import torch

    base = small.make_llama(tmp_path / "base", dtype="float32", tied=True)
    adapter = small.make_adapter(base, tmp_path / "adapter", **lora)

    found = merged(base, adapter, tmp_path / "out")

    assert ("lm_head.weight" in found) is untied
    expected = logits(small.adapted(base, adapter))
    torch.testing.assert_close(logits(small.load(tmp_path / "out")), expected, atol=5e-5, rtol=1e-4)


def test_tokens_that_were_added_come_along_and_the_config_counts_them(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    base = small.make_llama(tmp_path / "base", dtype="float32", tied=True)
    with small.quiet():
        grown = small.load(base)
        grown.resize_token_embeddings(130, mean_resizing=False)
        model = get_peft_model(grown, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        again = small.load(base)
        again.resize_token_embeddings(130, mean_resizing=False)
        expected = logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval())

    found = merged(base, tmp_path / "adapter", tmp_path / "out")

    assert found["model.embed_tokens.weight"].shape == (130, 64)
    config = json.loads((tmp_path / "out/config.json").read_bytes())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (130, True)
    torch.testing.assert_close(logits(small.load(tmp_path / "out")), expected, atol=5e-5, rtol=1e-4)


def test_several_adapters_are_added_up_with_their_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = small.make_llama(tmp_path / "base", dtype="float32")
    first, second = (small.make_adapter(base, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2))
    plan = plan_merge(base, first, "own", more=[(second, -0.25)], weight=0.5)
    (tmp_path / "out").mkdir()

    merge(plan, tmp_path / "out")

    name = "model.layers.1.mlp.down_proj"
    expected = small.tensors(base)[f"{name}.weight"].double()
    for folder, weight in ((first, 0.5), (second, -0.25)):
        factors = load_file(folder / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        expected += weight * 16 / 8 * (b @ a)
    torch.testing.assert_close(small.tensors(tmp_path / "out")[f"{name}.weight"].double(), expected, atol=1e-5, rtol=0)


def test_dora_cannot_be_weighted(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", use_dora=True)

    with pytest.raises(ParamsError, match="cannot be weighted or added to others"):
        plan_merge(base, adapter, "own", weight=0.5)


def test_dora_on_a_transposed_weight_larger_than_a_block_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small.make_gpt2(tmp_path / "base", dtype="float32")
    adapter = small.make_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True
    )
    monkeypatch.setattr(storage.Reader.blocks, "__defaults__", (7 * 64,))
    import torch

    found, expected = merged(base, adapter, tmp_path / "out"), small.peft_merged(base, adapter)

    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_embeddings_and_experts_are_nearer_to_float64_than_pefts_twice_rounded_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = small.make_model("gpt_oss", tmp_path / "base")
    adapter = small.make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["embed_tokens"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model"
    a, b = (factors[f"{prefix}.embed_tokens.lora_embedding_{half}"].double() for half in "AB")
    exact = {"model.embed_tokens.weight": 2 * (b @ a).T}
    a, b = (factors[f"{prefix}.layers.0.mlp.experts.lora_{half}.weight"].double() for half in "AB")
    a, b = a.reshape(4, 8, -1), b.reshape(-1, 8, 4).permute(2, 0, 1)
    exact["model.layers.0.mlp.experts.gate_up_proj"] = 2 * (b @ a).transpose(1, 2)
    before, peft = small.tensors(base), small.tensors(small.save_peft_merged(base, adapter, tmp_path / "peft"))

    found = merged(base, adapter, tmp_path / "out")

    for name, change in exact.items():
        wanted = before[name].double() + change
        mine, theirs = ((t[name].double() - wanted).abs().mean() for t in (found, peft))
        assert mine < theirs, name
        nearest = (wanted.bfloat16().double() - wanted).abs()
        assert ((found[name].double() - wanted).abs() <= nearest + 1e-6).all(), name


def test_chance_rounds_up_as_often_as_it_should_and_the_same_way_each_time(tmp_path: Path) -> None:
    import torch

    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    exact = merged(base, adapter, tmp_path / "exact", dtype="fp32")
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        merge(plan_merge(base, adapter, "own"), tmp_path / name, rounding="stochastic")
        results.append(small.tensors(tmp_path / name))

    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(results[0][name], results[1][name])
    error = results[0][name].double() - exact[name].double()
    assert (error.abs() <= exact[name].double().abs() * 2**-7).all()
    assert abs(error.mean()) < 3 * error.std() / error.numel() ** 0.5
    assert not torch.equal(results[0][name], exact[name].bfloat16())
