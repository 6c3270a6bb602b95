"""Targets on the architectures of the field, built from their configs at tiny size: what matches, and that it trains."""

from pathlib import Path
from typing import Any

import pytest

from regraft.errors import ParamsError, RegraftError

SMALL = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]
GATED = ["down_proj", "gate_proj", "up_proj"]
# config class, changes, attention, q+v, mlp, bare weights (last names), all by last name
ARCHITECTURES = [
    pytest.param("LlamaConfig", {}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Llama"),
    pytest.param("MistralConfig", {}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Mistral"),
    pytest.param("Qwen2Config", {}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Qwen2"),
    pytest.param("Qwen3Config", {"head_dim": 16}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Qwen3"),
    pytest.param("Gemma2Config", {"head_dim": 16}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Gemma 2"),
    pytest.param("Gemma3TextConfig", {"head_dim": 16}, QKVO, ["q_proj", "v_proj"], GATED, [], id="Gemma 3"),
    pytest.param(
        "Phi3Config", {}, ["o_proj", "qkv_proj"], ["qkv_proj"], ["down_proj", "gate_up_proj"], [], id="Phi-3"
    ),
    pytest.param(
        "GPT2Config", {"n_inner": 128}, ["c_attn", "c_proj"], ["c_attn"], ["c_fc", "c_proj"], [], id="GPT-2 (Conv1D)"
    ),
    pytest.param(
        "GPTNeoXConfig", {}, ["dense", "query_key_value"], ["query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"], [],
        id="GPT-NeoX",
    ),
    pytest.param(
        "FalconConfig", {}, ["dense", "query_key_value"], ["query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"], [],
        id="Falcon",
    ),
    pytest.param("Exaone4Config", {"sliding_window": 64}, QKVO, ["q_proj", "v_proj"], GATED, [], id="EXAONE 4"),
    pytest.param(
        "MixtralConfig", {"num_local_experts": 4}, QKVO, ["q_proj", "v_proj"], None, ["down_proj", "gate_up_proj"],
        id="Mixtral (fused experts)",
    ),
    pytest.param(
        "Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
        QKVO, ["q_proj", "v_proj"], None, ["down_proj", "gate_up_proj"], id="Qwen3-MoE (fused experts)",
    ),
]  # fmt: skip


def _model(config: str, changes: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL | changes))


@pytest.mark.parametrize(("config", "changes", "attention", "query_value", "mlp", "bare"), ARCHITECTURES)
def test_each_group_names_its_layers_and_an_adapter_on_all_of_them_lowers_the_loss_and_comes_back(
    config: str,
    changes: dict[str, Any],
    attention: list[str],
    query_value: list[str],
    mlp: list[str] | None,
    bare: list[str],
    tmp_path: Path,
) -> None:
    import torch
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    from regraft.model.adapter import adapter_parameters, attach, load_adapter, lora_layers, save_adapter
    from regraft.train.loss import summed_loss
    from regraft.train.targets import bare_weights, check_adapted, expected_modules, peft_targets

    model = _model(config, changes)
    groups = {group: expected_modules(model, group) for group in ("attention", "q+v", "all-linear")}
    assert _last(groups["attention"]) == attention
    assert _last(groups["q+v"]) == query_value
    assert {"experts", "gate"}.isdisjoint(_last(groups["all-linear"]))
    assert {_last([name])[0] for name in bare_weights(model) if ".experts." in name} == set(bare)
    if mlp is None:
        with pytest.raises(ParamsError, match="mlp names no linear layer; this base has k_proj"):
            expected_modules(model, "mlp")
    else:
        inner = expected_modules(model, "mlp")
        assert _last(inner) == mlp
        assert sorted([*inner, *groups["attention"]]) == groups["all-linear"]

    expected = groups["all-linear"]
    model.requires_grad_(False)
    conv = isinstance(model.get_submodule(expected[0]), Conv1D)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = attach(
        model,
        LoraConfig(
            r=4, lora_alpha=8, target_modules=peft_targets(model, expected), fan_in_fan_out=conv, task_type="CAUSAL_LM"
        ),
    )
    check_adapted(expected, list(lora_layers(adapted)), model)
    with pytest.raises(RegraftError, match=f"expected; without an adapter: .*{expected[0][-6:]}"):
        check_adapted(expected, [name for name in lora_layers(adapted) if name != expected[0]], model)

    ids = torch.arange(8, 40)[None]
    positions = torch.cat([torch.arange(16), torch.arange(16)])[None]  # two documents in a block
    labels = torch.where(positions == 0, -100, ids)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    optimizer = torch.optim.AdamW(adapter_parameters(adapted).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = summed_loss(adapted, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    adapted.eval()
    with torch.no_grad():
        said = adapted(input_ids=ids, position_ids=positions, use_cache=False).logits
    save_adapter(adapted, tmp_path / "adapter", base_name="base")
    fresh = _model(config, changes)
    fresh.load_state_dict(before)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids, position_ids=positions, use_cache=False).logits, said)


def test_a_list_an_expression_and_a_misspelt_group_mean_what_they_say() -> None:
    from regraft.train.targets import expected_modules

    model = _model("LlamaConfig", {})
    assert expected_modules(model, ["self_attn.q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert expected_modules(model, r"model\.layers\.1\..*_proj") == sorted(
        f"model.layers.1.{name}" for name in [*(f"self_attn.{n}" for n in QKVO), *(f"mlp.{n}" for n in GATED)]
    )
    assert expected_modules(model, ["lm_head"]) == ["lm_head"]
    with pytest.raises(ParamsError, match=r"atention names no linear layer; .* did you mean `attention`\?"):
        expected_modules(model, "atention")
    with pytest.raises(ParamsError, match=r"q_porj names no linear layer; .* did you mean `q_proj`\?"):
        expected_modules(model, ["q_porj", "v_proj"])


def _last(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
