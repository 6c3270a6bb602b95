"""The shapes from config.json against the models that transformers builds from the same file."""

import json
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.plan.architecture import FAMILIES, architecture, read_architecture

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32}),
    ("mistral", SMALL),
    ("qwen2", SMALL),
    ("qwen3", {**SMALL, "head_dim": 32, "tie_word_embeddings": True}),
    ("gemma", {**SMALL, "head_dim": 32}),
    ("gemma2", {**SMALL, "head_dim": 32}),
    ("gemma3_text", {**SMALL, "head_dim": 32}),
    ("phi3", {**SMALL, "pad_token_id": 0}),
    ("exaone4", SMALL),
    ("mixtral", {**SMALL, "num_local_experts": 4}),
    ("qwen3_moe", {**SMALL, **MOE, "num_experts": 4}),
    ("qwen3_moe", {**SMALL, **MOE, "num_experts": 4, "mlp_only_layers": [0]}),
    ("gpt2", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    ("gpt2", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}),
    ("gpt_neox", SMALL),
    ("gpt_neox", {**SMALL, "attention_bias": False, "tie_word_embeddings": True}),
    ("falcon", SMALL),
    ("falcon", {**SMALL, "bias": True, "multi_query": False, "parallel_attn": False}),
    ("falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
]


def built(folder: Path, family: str, changes: dict[str, Any]) -> Any:
    """The model on the meta device, its config.json written into `folder` as transformers writes it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**changes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
def test_every_weight_has_the_shape_that_transformers_gives_it(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    from transformers.pytorch_utils import Conv1D

    model = built(tmp_path, family, changes)
    turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    expected = {}
    for name, parameter in model.named_parameters():
        name = name.removesuffix(".weight")
        expected[name] = tuple(reversed(parameter.shape)) if name in turned else tuple(parameter.shape)
    found = read_architecture(tmp_path)
    assert {weight.name: weight.shape for weight in found.weights} == expected
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
def test_the_layers_that_get_adapters_are_the_ones_that_training_finds(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = built(tmp_path, family, changes)
    kinds = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert set(read_architecture(tmp_path).linears()) == kinds - {"lm_head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_leaves_out_has_transformers_own_default(family: str, tmp_path: Path) -> None:
    model = built(tmp_path, family, {"num_hidden_layers": 1} if family != "gpt2" else {"n_layer": 1})
    assert read_architecture(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_known_sizes_of_released_models_come_out() -> None:
    llama8b = architecture(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    )
    assert llama8b.parameters == 8_030_261_248  # as its model card's index says
    assert architecture({"model_type": "gpt2"}).parameters == 124_439_808


def test_of_a_model_with_several_parts_the_text_part_counts() -> None:
    text = {"model_type": "gemma3_text", **SMALL}
    assert architecture({"model_type": "gemma3", "text_config": text}) == architecture(text)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"no plan for the model type 'mamba'; known are .*llama"):
        architecture({"model_type": "mamba"})
    with pytest.raises(MissingInput, match=r"config\.json is missing"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(DamagedArtifact, match="not JSON"):
        read_architecture(tmp_path)
    with pytest.raises(DamagedArtifact, match="make no model"):
        architecture(json.loads('{"model_type": "llama", "num_attention_heads": 0}'))
