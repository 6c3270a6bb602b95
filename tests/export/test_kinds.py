"""Every kind of LoRA on many architectures: the streaming merge and PEFT's, tensor by tensor and bit by bit."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.export import sink
from regraft.export.folder import write_companions
from regraft.export.merge import Rounding, merge, plan_merge

LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "falcon": ["query_key_value", "dense_h_to_4h"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "gpt_oss": ["q_proj", "o_proj"],
}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in", "falcon": "word_embeddings", "bloom": "word_embeddings"}
PATTERNS = {"rank_pattern": {"layers.1.*": 3, "h.1.*": 3}, "alpha_pattern": {"q_proj": 5, "c_attn": 40, "dense": 7}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
}


def in_files(base: Path, adapter: Path, out: Path, rounding: Rounding = "nearest") -> dict[str, Any]:
    plan = plan_merge(base, adapter, "own")
    out.mkdir()
    merge(plan, out, rounding=rounding)
    write_companions(plan, out, dtype="own")
    return small.tensors(out)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    import torch

    assert sorted(found) == sorted(expected)
    return [name for name in found if not torch.equal(found[name], expected[name])]


def lora_for(architecture: str, **more: Any) -> dict[str, Any]:
    in_by_out = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    return {"target_modules": LINEAR.get(architecture, ["q_proj", "v_proj", "down_proj"]), **in_by_out, **more}


QUICK = ("llama", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral", "gpt_oss")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.extended) for name in small.ARCHITECTURES]


@pytest.mark.parametrize("architecture", ALL)
def test_every_kind_of_lora_is_merged_bit_for_bit_as_by_peft(tmp_path: Path, architecture: str) -> None:
    base = small.make_model(architecture, tmp_path / "base")
    embedding = EMBEDDING.get(architecture, "embed_tokens")
    kinds = {
        **KINDS,
        "trained biases": {"bias": "all"},
        "tokens": {"trainable_token_indices": {embedding: [5, 3]}},
        "norms saved whole": {"modules_to_save": NORMS.get(architecture, ["norm"])},
    }
    different = {}
    for kind, settings in kinds.items():
        adapter = small.make_adapter(base, tmp_path / kind / "adapter", **lora_for(architecture, **settings))
        expected = small.tensors(small.save_peft_merged(base, adapter, tmp_path / kind / "peft"))
        different[kind] = differences(in_files(base, adapter, tmp_path / kind / "out"), expected)

    assert different == {kind: [] for kind in kinds}


def test_a_slow_disk_does_not_let_one_tensor_overwrite_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hashlib.sha256

    class Slow:
        """A digest that looks at the bytes late, as a busy machine does."""

        def __init__(self, content: bytes = b"") -> None:
            self._digest = real(content)

        def update(self, view: memoryview) -> None:
            time.sleep(0.01)
            self._digest.update(view)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    base = small.make_model("qwen2", tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", **lora_for("qwen2", bias="all"))
    expected = small.tensors(small.save_peft_merged(base, adapter, tmp_path / "peft"))
    monkeypatch.setattr(sink.hashlib, "sha256", Slow)

    assert differences(in_files(base, adapter, tmp_path / "out"), expected) == []


NORMS = {
    "gpt2": ["ln_f"],
    "gpt_neox": ["final_layer_norm"],
    "opt": ["final_layer_norm"],
    "falcon": ["ln_f"],
    "bloom": ["ln_f"],
}


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "opt", "falcon", "bloom"])
def test_a_bias_in_b_is_merged_as_by_peft(tmp_path: Path, architecture: str) -> None:
    base = small.make_model(architecture, tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter", **lora_for(architecture, lora_bias=True))
    expected = small.tensors(small.save_peft_merged(base, adapter, tmp_path / "peft"))

    assert differences(in_files(base, adapter, tmp_path / "out"), expected) == []


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_an_embedding_and_its_output_layer_are_merged_where_peft_rounds_as_by_peft(
    tmp_path: Path, architecture: str, dora: bool
) -> None:
    base = small.make_model(architecture, tmp_path / "base")
    output = "embed_out" if architecture == "gpt_neox" else "lm_head"
    targets = [EMBEDDING.get(architecture, "embed_tokens"), output]
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=targets, use_dora=dora)
    expected = small.tensors(small.save_peft_merged(base, adapter, tmp_path / "peft"))

    assert differences(in_files(base, adapter, tmp_path / "out", "peft"), expected) == []


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fused_experts_are_merged_where_peft_rounds_as_by_peft(tmp_path: Path, architecture: str) -> None:
    base = small.make_model(architecture, tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"target_parameters": experts, "rank_pattern": {".*gate_up_proj": 4}}
    adapter = small.make_adapter(base, tmp_path / "adapter", **lora_for(architecture, **settings))
    expected = small.tensors(small.save_peft_merged(base, adapter, tmp_path / "peft"))

    assert differences(in_files(base, adapter, tmp_path / "out", "peft"), expected) == []
