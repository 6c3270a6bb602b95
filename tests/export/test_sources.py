"""The dequantised base against what bitsandbytes really computes with."""

from pathlib import Path
from typing import Any

import pytest
import small

from regraft.export.merge import merge, plan_merge
from regraft.export.sources import dequantized, quantized_modules
from regraft.export.tensors import Reader
from regraft.model.params import Quantization


def quantized_model(folder: Path, quantization: Quantization, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        load_in_8bit=quantization.bits == 8,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"})


def weights_in_use(model: Any) -> dict[str, Any]:
    """What each quantised layer multiplies by, by module."""
    import bitsandbytes.functional as bnb

    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            found[name] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            found[name] = module.weight.data.float() * module.weight.SCB[:, None] / 127
    return found


def read(plan: Any, quantization: Quantization, dtype: Any) -> dict[str, Any]:
    """Every tensor of the source, put together from its blocks."""
    import torch

    source = dequantized(plan, quantization, dtype)
    found = {}
    for step in plan.steps:
        with Reader(plan.base / step.file) as reader:
            blocks = [block.clone() for _, block in source(reader, step.source)]
        found[step.source] = torch.cat(blocks).reshape(step.target.shape)
    return found


@pytest.mark.parametrize(
    "quantization",
    [Quantization(), Quantization(double_quant=False), Quantization(type="fp4")],
    ids=["nf4-double", "nf4", "fp4"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_source_gives_bit_for_bit_the_weights_that_a_4_bit_layer_computes_with(
    tmp_path: Path, quantization: Quantization, dtype: str
) -> None:
    import torch

    base = small.make_llama(tmp_path / "base", dtype=dtype)
    plan = plan_merge(base, small.make_adapter(base, tmp_path / "adapter"), "own")

    expected = weights_in_use(quantized_model(base, quantization, getattr(torch, dtype)))
    found, before = read(plan, quantization, getattr(torch, dtype)), small.tensors(base)

    assert quantized_modules(plan, quantization) == sorted(expected)
    for name, tensor in found.items():
        wanted = expected.get(name.removesuffix(".weight"), before[name])
        assert torch.equal(tensor, wanted), name


def test_layers_stored_in_by_out_are_quantised_the_way_they_are_loaded(tmp_path: Path) -> None:
    import torch

    base = small.make_gpt2(tmp_path / "base", dtype="float32")
    plan = plan_merge(
        base, small.make_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True), "own"
    )

    expected = weights_in_use(quantized_model(base, Quantization(), torch.float32))
    found = read(plan, Quantization(), torch.float32)

    assert quantized_modules(plan, Quantization()) == sorted(expected)
    assert all(torch.equal(found[f"{name}.weight"].t(), weight) for name, weight in expected.items())


def test_eight_bits_are_rounded_as_bitsandbytes_rounds_them(tmp_path: Path) -> None:
    import torch

    base = small.make_llama(tmp_path / "base", dtype="float32")
    plan = plan_merge(base, small.make_adapter(base, tmp_path / "adapter"), "own")

    expected = weights_in_use(quantized_model(base, Quantization(bits=8), torch.float32))
    found = read(plan, Quantization(bits=8), torch.float32)

    assert quantized_modules(plan, Quantization(bits=8)) == sorted(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"], weight, atol=1e-7, rtol=1e-6)


def test_skipped_modules_are_not_taken_for_quantised(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base")
    plan = plan_merge(base, small.make_adapter(base, tmp_path / "adapter"), "own")

    modules = quantized_modules(plan, Quantization(skip_modules=["o_proj", "model.layers.0"]))

    assert modules == [
        *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")),
        *(f"model.layers.1.self_attn.{name}_proj" for name in ("k", "q", "v")),
    ]


@pytest.mark.parametrize("trained", [False, True], ids=["the base's bias", "a trained bias"])
def test_on_a_quantised_base_with_biases_the_merge_is_right_where_pefts_is_wrong(tmp_path: Path, trained: bool) -> None:
    """Against float64: layer by layer what the adapter computes on the 4-bit base that it was trained on.

    PEFT merges into the 4-bit weights and quantises the sum again (its own warning says so), which loses small changes.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    base = small.make_model("qwen2", tmp_path / "base", dtype="float32")
    bias = {"bias": "lora_only"} if trained else {}
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"], **bias)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in factors:
        if ".lora_B" in name:
            factors[name] *= 0.01  # a change of some percent of the weight, as training leaves it
    save_file(factors, adapter / "adapter_model.safetensors")
    quantization = Quantization(double_quant=False)
    plan = plan_merge(base, adapter, "fp32")

    (tmp_path / "out").mkdir()
    merge(plan, tmp_path / "out", weights=dequantized(plan, quantization, torch.float32))

    mine = small.tensors(tmp_path / "out")
    with small.quiet():
        four_bit = PeftModel.from_pretrained(quantized_model(base, quantization, torch.float32), adapter).eval()
    start = {name.removeprefix("base_model.model."): w for name, w in weights_in_use(four_bit).items()}
    with small.quiet(), pytest.warns(UserWarning, match="4-bit linear may get different generations"):
        theirs = weights_in_use(four_bit.merge_and_unload())
    worst, pefts = 0.0, []
    for layer in range(2):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            a = factors[f"base_model.model.{name}.lora_A.weight"].double()
            b = factors[f"base_model.model.{name}.lora_B.weight"].double()
            change = 2.0 * b @ a
            right = start[f"{name}.base_layer"].double() + change
            worst = max(worst, float((mine[f"{name}.weight"].double() - right).abs().max()))
            pefts.append(float((theirs[name].double() - right).norm() / change.norm()))
            if module != "mlp.down_proj":
                before = small.tensors(base)[f"{name}.bias"]
                learnt = factors.get(f"base_model.model.{name}.base_layer.bias")
                learnt = factors.get(f"base_model.model.{name}.bias") if learnt is None else learnt
                assert (learnt is not None) == trained
                assert torch.equal(mine[f"{name}.bias"], before if learnt is None else learnt)
    assert worst < 1e-6
    assert min(pefts) > 0.5  # more than half of the change is gone, or drowned
