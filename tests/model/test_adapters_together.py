"""Adapters of different kinds on one loaded base: each says what it says alone, and the base what it says without any."""

from pathlib import Path
from typing import Any

import pytest

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [5, 9]},
    "saved": {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True},
    "ranks": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 8}, "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved adapter of each kind, with random values."""
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters, attach, save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    for name, config in KINDS.items():
        torch.manual_seed(len(name))
        made = attach(
            _base(tiny_base),
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **config),
        )
        with torch.no_grad():
            for parameter in adapter_parameters(made).values():
                parameter += 0.1 * torch.randn_like(parameter)
        save_adapter(made, folder / name, base_name="base")
    return {name: folder / name for name in KINDS}


def _base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _said(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None]).logits.clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_an_adapter_says_the_same_after_another_was_taken_off_and_leaves_the_base_as_it_was(
    tiny_base: Path, adapters: dict[str, Path], kind: str
) -> None:
    """As the stage `evaluate` scores one adapter after the other in one load of the base."""
    import torch

    from regraft.model.adapter import load_adapter, take_off

    plain = _said(_base(tiny_base).eval())
    alone = _said(load_adapter(_base(tiny_base), adapters[kind]))
    assert not torch.allclose(alone, plain, atol=1e-3)

    model = _base(tiny_base)
    for other in KINDS:
        model = take_off(load_adapter(model, adapters[other]))
        assert torch.equal(_said(model.eval()), plain), other
        model = load_adapter(model, adapters[kind])
        torch.testing.assert_close(_said(model), alone, rtol=1e-5, atol=1e-5)
        model = take_off(model)
