"""The peak that is predicted for a step against the same step traced without data, as a GPU would run it."""

import statistics
from typing import Any

import pytest
from simulated import step

from regraft.plan.activations import activations
from regraft.plan.architecture import architecture
from regraft.plan.memory import LIBRARIES, predict
from regraft.plan.setup import Setup

SMALL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
GPT2 = {"vocab_size": 32000, "n_embd": 1024, "n_layer": 3, "n_head": 16}
FALCON = {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 8}
WIDE = {
    **SMALL,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
}
FLAT = {**WIDE, "vocab_size": 4000, "num_hidden_layers": 2}
EXAONE = {
    "vocab_size": 102400,
    "hidden_size": 2560,
    "intermediate_size": 7168,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", SMALL, {}),
    ("llama", SMALL, {"bits": 16}),
    ("llama", SMALL, {"checkpointing": True}),
    ("llama", SMALL, {"bits": 16, "checkpointing": True}),
    ("llama", SMALL, {"dropout": True}),
    ("llama", SMALL, {"bits": 16, "dropout": True}),
    ("llama", SMALL, {"trained": 0.2, "rank": 64}),
    ("llama", SMALL, {"trained": 0.05, "checkpointing": True}),
    ("llama", SMALL, {"trained": 0.05, "bits": 16, "checkpointing": True}),
    ("llama", WIDE, {"batch": 1, "length": 2048}),
    ("llama", WIDE, {"batch": 4, "length": 2048, "trained": 0.3, "bits": 16, "checkpointing": True}),
    ("qwen3", SMALL, {"trained": 0.02}),
    ("qwen3", SMALL, {"bits": 16}),
    ("gemma2", SMALL, {"attention": "eager"}),
    ("gemma3_text", SMALL, {}),
    ("phi3", {**SMALL, "pad_token_id": 0}, {"bits": 16}),
    ("exaone4", SMALL, {}),
    ("gpt2", GPT2, {}),
    ("gpt2", GPT2, {"bits": 16}),
    ("gpt_neox", SMALL, {}),
    ("falcon", FALCON, {}),
    ("llama", SMALL, {"unquantized_fp32": True}),
    ("llama", SMALL, {"unquantized_fp32": True, "checkpointing": True}),
    ("llama", SMALL, {"unquantized_fp32": True, "trained": 0.05, "checkpointing": True}),
    ("llama", FLAT, {"batch": 1, "length": 512, "trained": 0.02, "bits": 16, "checkpointing": True}),
    ("llama", FLAT, {"batch": 1, "length": 2048, "trained": 0.02, "checkpointing": True}),
    ("llama", EXAONE, {"batch": 1, "length": 1024, "chunk": 256, "checkpointing": True}),
    ("llama", EXAONE, {"batch": 1, "length": 1024, "chunk": 256, "checkpointing": True, "unquantized_fp32": True}),
    ("llama", SMALL, {"batch": 4, "length": 1024, "chunk": 1024}),
    ("qwen3", SMALL, {"batch": 4, "length": 1024, "chunk": 1024, "bits": 16, "checkpointing": True}),
    ("llama", SMALL, {"fused": True, "chunk": 1024}),
    ("llama", SMALL, {"fused": True, "chunk": 1024, "bits": 16, "batch": 4}),
    ("llama", WIDE, {"fused": True, "chunk": 1024, "batch": 2, "length": 2048}),
    ("llama", WIDE, {"fused": True, "chunk": 1024, "batch": 2, "length": 2048, "bits": 16}),
    ("qwen3", SMALL, {"fused": True, "trained": 0.2}),
    ("llama", FLAT, {"fused": True, "batch": 1, "length": 2048, "trained": 0.02, "checkpointing": True}),
    ("llama", FLAT, {"fused": True, "batch": 1, "length": 2048, "trained": 0.02, "checkpointing": True, "bits": 16}),
    ("llama", EXAONE, {"fused": True, "batch": 1, "length": 1024, "chunk": 256, "checkpointing": True}),
    ("llama", SMALL, {"fused": True, "trained": 0.05, "checkpointing": True, "unquantized_fp32": True}),
    ("llama", SMALL, {"fused": True, "trained": 0.05, "batch": 4, "bits": 16, "checkpointing": True}),
    ("llama", SMALL, {"fused": True, "liger": True, "chunk": 1024}),
    ("llama", WIDE, {"fused": True, "liger": True, "chunk": 1024, "batch": 2, "length": 2048, "bits": 16}),
    ("llama", FLAT, {"fused": True, "liger": True, "batch": 1, "length": 2048, "trained": 0.02, "checkpointing": True}),
    ("qwen2", SMALL, {"fused": True, "liger": True, "batch": 4, "bits": 16, "trained": 0.05, "checkpointing": True}),
]
RATIOS: dict[int, float] = {}


QUICK = {0, 1, 2, 5, 8, 9, 13, 17, 20, 23, 25, 26, 28, 31, 35, 36, 39, 40, 42}
"""The others are like them; `make test-extended` runs all."""


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=() if n in QUICK else pytest.mark.extended) for n in range(len(CASES))]
)
def test_the_peak_of_a_step_is_predicted_within_six_percent(case: int) -> None:
    from transformers import CONFIG_MAPPING

    family, shapes, changes = CASES[case]
    config = CONFIG_MAPPING[family](**shapes)
    setup = Setup(**{"batch": 2, "length": 512, **changes})
    predicted = predict(architecture(config.to_dict()), setup)
    traced = step(config, setup)
    expected = predicted.activations + predicted.logits + predicted.workspace - LIBRARIES
    assert (predicted.adapter, predicted.gradients) == (traced["adapter"], traced["gradients"])
    RATIOS[case] = expected / traced["peak"]
    assert 0.94 < RATIOS[case] < 1.06


def test_the_median_of_all_those_is_within_two_percent() -> None:
    if not RATIOS.keys() >= QUICK:
        pytest.skip("only after the others")
    assert abs(statistics.median(RATIOS.values()) - 1) < 0.02


def test_checkpointing_keeps_less_and_dropout_more() -> None:
    model = architecture({"model_type": "llama", **SMALL})
    plain = Setup(batch=2, length=512)
    assert activations(model, plain.but(checkpointing=True)).saved < activations(model, plain).saved / 8
    assert activations(model, plain.but(dropout=True)).saved > activations(model, plain).saved


def test_a_kernel_that_knows_lengths_keeps_no_mask_and_no_repeated_keys() -> None:
    model = architecture({"model_type": "llama", **SMALL})
    plain = Setup(batch=2, length=512)
    less = activations(model, plain).saved - activations(model, plain.but(attention="lengths")).saved
    repeated, mask = 2 * 2 * (1024 - 512), 2 * 512
    once = plain.tokens * 512  # which positions see which
    assert less == 3 * plain.tokens * (repeated + mask) + once


def test_a_trace_leaves_the_process_as_it_was() -> None:
    import torch
    from transformers import CONFIG_MAPPING

    before = (torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.nn.functional.dropout)
    step(CONFIG_MAPPING["llama"](**{**SMALL, "num_hidden_layers": 1}), Setup(batch=1, length=16, checkpointing=True))
    assert (torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.nn.functional.dropout) == before
    assert before[0] is False
