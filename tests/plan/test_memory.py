"""The parts that are exact, against the bytes of real tiny models."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import ParamsError
from regraft.model.params import ModelParams, Quantization
from regraft.plan.architecture import architecture, read_architecture
from regraft.plan.memory import Prediction, predict, quantized_bytes
from regraft.plan.setup import Setup, adapted, setup_from
from regraft.train.params import TrainParams

GPT2 = {"vocab_size": 320, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA),
    ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    ("mixtral", {**LLAMA, "num_local_experts": 4}),
    ("gpt2", GPT2),
    ("falcon", LLAMA),
]


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: m[0])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, as it would lie on a disk."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family, changes = request.param
    path = tmp_path_factory.mktemp("models") / family
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**changes)).to(torch.bfloat16).save_pretrained(path)
    return path


def loaded(folder: Path, **quantization: Any) -> Any:
    """The base as training loads and prepares it."""
    from types import SimpleNamespace

    from regraft.model.load import load_model, prepare_for_adapters
    from regraft.model.params import Quantization

    how = Quantization(compute_dtype="bf16", **quantization)
    base: Any = SimpleNamespace(folder=folder, new_tokens={})
    model = load_model(base, how, training=True)
    prepare_for_adapters(model, how)
    return model


def held(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_tensors(state: Any) -> list[Any]:
    """All tensors of a 4-bit layer's scales."""
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


@pytest.mark.parametrize(
    ("double", "skip", "rest"),
    [
        (True, [], "auto"),
        (True, [], "fp32"),
        (False, [], "auto"),
        (True, ["o_proj"], "fp32"),
        (True, ["o_proj"], "auto"),
    ],
)
def test_a_4_bit_base_is_as_many_bytes_as_bitsandbytes_holds(
    folder: Path, double: bool, skip: list[str], rest: str
) -> None:
    model = loaded(folder, bits=4, double_quant=double, skip_modules=skip, unquantized=rest)
    four = [m for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    scales = [t for module in four for t in state_tensors(module.weight.quant_state)]
    packed = [module.weight for module in four]
    others = [p for p in model.parameters() if not any(p is weight for weight in packed)]
    setup = Setup(double_quant=double, skip_modules=tuple(skip), unquantized_fp32=rest == "fp32")
    found = predict(read_architecture(folder), setup)
    assert found.base == held([*packed, *scales])
    assert found.unquantized == held(others)


def test_what_is_cast_to_fp32_is_what_peft_casts(folder: Path) -> None:
    from peft import prepare_model_for_kbit_training

    theirs = prepare_model_for_kbit_training(loaded(folder, bits=4), use_gradient_checkpointing=False)
    ours = loaded(folder, bits=4, unquantized="fp32")
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


def test_an_8_bit_base_is_as_many_bytes_as_bitsandbytes_holds(folder: Path) -> None:
    import bitsandbytes as bnb

    model = loaded(folder, bits=8)
    eight = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    rest = [p for p in model.parameters() if not any(p is m.weight for m in eight)]
    found = predict(read_architecture(folder), Setup(bits=8))
    assert found.base == held([*(m.weight for m in eight), *(m.weight.SCB for m in eight)])
    assert found.unquantized == held(rest)


def test_a_16_bit_base_keeps_its_bytes(folder: Path) -> None:
    model = loaded(folder, bits=16)
    found = predict(read_architecture(folder), Setup(bits=16))
    assert found.base + found.unquantized == held(model.parameters())


def test_tokens_that_the_base_lacks_are_rows_more_at_both_ends(folder: Path) -> None:
    from regraft.model.tokens import make_room

    shape, model = read_architecture(folder), loaded(folder, bits=16)
    make_room(model, {"<a>": 320, "<b>": 321, "<c>": 322})
    found, before = predict(shape, Setup(bits=16, added_tokens=3)), predict(shape, Setup(bits=16))
    assert found.base + found.unquantized == held(model.parameters())
    assert found.trainable - before.trainable == 3 * 128 * (1 if shape.tied else 2)


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_gradients_and_optimizer_are_the_bytes_that_a_step_makes(folder: Path, dora: bool) -> None:
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import attach

    model = loaded(folder, bits=16).float()
    shape = read_architecture(folder)
    setup = Setup(bits=16, rank=4, dora=dora)
    names, turned = list(adapted(shape, setup)), folder.name == "gpt2"
    tuned = attach(model, LoraConfig(r=4, target_modules=names, use_dora=dora, fan_in_fan_out=turned))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    found = predict(shape, setup)
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.adapter == held(trained)
    assert found.gradients == held(p.grad for p in trained)
    assert found.optimizer == held(states)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_an_8_bit_optimizer_holds_a_byte_and_a_share_of_a_scale_for_each_value(name: str) -> None:
    import bitsandbytes as bnb
    import torch

    sizes = [(16, 512), (100, 300), (4, 100)]  # the last one is so small that its states stay in fp32
    trained = [torch.nn.Parameter(torch.ones(shape)) for shape in sizes]
    optimizer = {"adamw_8bit": bnb.optim.AdamW8bit, "lion_8bit": bnb.optim.Lion8bit}[name](trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    keys = ("state1", "state2", "absmax1", "absmax2")
    states = [s[k] for s in optimizer.state.values() for k in keys if k in s and s[k] is not None]
    from regraft.plan.memory import _optimizer

    assert _optimizer([math.prod(s) for s in sizes], name) == (held(states), 0)
    assert sum(_optimizer([math.prod(s) for s in sizes], f"paged_{name}")) == held(states)


def test_states_of_small_tensors_and_the_scales_of_all_stay_on_the_gpu_when_an_optimizer_pages() -> None:
    from regraft.plan.memory import _optimizer

    assert _optimizer([16 * 4096], "paged_adamw_8bit") == (2 * (65536 + 4 * 256), 0)
    assert _optimizer([16 * 8192], "paged_adamw_8bit") == (2 * 4 * 512, 2 * 131072)
    assert _optimizer([16 * 8192, 4096], "paged_adamw_32bit") == (2 * 4 * 4096, 2 * 4 * 131072)


def test_nf4_with_double_quantisation_takes_half_a_byte_and_a_127th_of_a_bit_more() -> None:
    values = 4096 * 4096
    bits = 8 * quantized_bytes(values, 4096, 4, double_quant=True) / values
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)  # arXiv:2305.14314, section 3
    saved = 8 * quantized_bytes(values, 4096, 4, double_quant=False) / values - bits
    assert saved == pytest.approx(0.373, abs=1e-3)


def test_full_fine_tuning_takes_sixteen_bytes_for_each_parameter() -> None:
    model = architecture({"model_type": "gpt2"})
    found = predict(model, Setup(method="full", bits=32))
    assert found.base + found.unquantized + found.gradients + found.optimizer == 16 * model.parameters
    assert (found.trainable, found.adapter) == (model.parameters, 0)


def test_the_total_is_the_sum_of_its_parts() -> None:
    found = predict(architecture({"model_type": "gpt2"}), Setup())
    told = found.to_dict()
    assert sum(told[part] for part in Prediction.PARTS) == told["total"] == found.tensors + found.context


@pytest.mark.parametrize(
    ("targets", "last"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("q+v", {"q_proj", "v_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (("v_proj", "layers.0.mlp.up_proj"), {"v_proj", "up_proj"}),
        (r"model\.layers\.1\..*_proj", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets_are_groups_lists_or_an_expression(targets: Any, last: set[str]) -> None:
    found = adapted(architecture({"model_type": "llama", **LLAMA}), Setup(targets=targets))
    assert {name.rpartition(".")[2] for name in found} == last


def test_a_target_that_names_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ParamsError, match=r"w_proj.* names no linear layer; this base has c_attn, c_fc, c_proj"):
        adapted(architecture({"model_type": "gpt2"}), Setup(targets=("w_proj",)))


def test_a_pattern_changes_the_rank_of_the_layers_that_it_names() -> None:
    found = adapted(architecture({"model_type": "llama", **LLAMA}), Setup(rank=8, rank_pattern=(("q_proj", 32),)))
    assert {name.rpartition(".")[2]: rank for name, (_, _, rank) in found.items() if rank != 8} == {"q_proj": 32}


def test_a_setup_is_what_the_parameters_say() -> None:
    train = TrainParams(
        max_steps=1,
        rank=8,
        modules_to_save=["embed_tokens"],
        trainable_tokens=["<a>", "<b>"],
        batch_size=4,
        accumulation=2,
        dropout=0.1,
        gradient_checkpointing=True,
    )
    found = setup_from(train, ModelParams(), length=256, trained=0.5)
    assert found == Setup(
        rank=8,
        batch=4,
        accumulation=2,
        dropout=True,
        checkpointing=True,
        length=256,
        trained=0.5,
        compute_bytes=2,
        saved=("embed_tokens",),
        new_tokens=2,
        remade=True,
    )
    chunk, fused = train.model_copy(update={"logits_chunk": 64}), train.model_copy(update={"kernels": "fused"})
    assert setup_from(chunk, ModelParams(), length=256, on_gpu=False).chunk == 64
    assert (
        setup_from(fused, ModelParams(), length=256).chunk,
        setup_from(fused, ModelParams(), length=256, on_gpu=False).chunk,
    ) == (1024, None)
    assert not setup_from(fused, ModelParams(), length=256).fused  # with dropout PEFT's own operations stay
    quick = fused.model_copy(update={"dropout": 0.0, "modules_to_save": [], "trainable_tokens": []})
    assert setup_from(quick, ModelParams(), length=256).fused
    assert not setup_from(quick, ModelParams(), length=256).remade
    assert not setup_from(quick, ModelParams(), length=256, on_gpu=False).fused
    assert not setup_from(quick, ModelParams(quantization=Quantization(bits=8)), length=256).fused
    half = Quantization(compute_dtype="fp16")
    assert setup_from(quick, ModelParams(quantization=half), length=256).remade
    assert setup_from(train, ModelParams(quantization=half), length=256).unquantized_fp32
    assert setup_from(train, ModelParams(), length=256, on_gpu=False).compute_bytes == 4


def test_what_is_trained_whole_or_token_by_token_counts() -> None:
    model = architecture({"model_type": "llama", **LLAMA})
    more = predict(model, Setup(saved=("embed_tokens",), new_tokens=3)).trainable - predict(model, Setup()).trainable
    assert more == 320 * 128 + 3 * 128


def test_exaone_trains_at_1024_tokens_in_4_gb_by_what_is_not_cast_and_by_fewer_logits() -> None:
    shape = {"vocab_size": 102400, "hidden_size": 2560, "intermediate_size": 7168, "num_hidden_layers": 30}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    model = architecture({"model_type": "llama", **shape})
    setup = Setup(batch=1, checkpointing=True, optimizer="paged_adamw_8bit", attention="lengths")
    cast, kept = predict(model, setup.but(unquantized_fp32=True)), predict(model, setup)
    fewer = predict(model, setup.but(chunk=256))
    embedding = 102400 * 2560
    assert cast.unquantized - kept.unquantized == 2 * (embedding + 61 * 2560)
    assert kept.logits - fewer.logits == 102400 * (12 * 1024 - 8 * 256) - 2 * 2560 * 1024
    assert (cast.total > 4.9e9, kept.total < 4e9, fewer.total < 3e9) == (True, True, True)


def test_a_base_that_is_shared_out_takes_its_share_and_what_is_gathered_for_a_moment() -> None:
    model = architecture({"model_type": "llama", **{**LLAMA, "num_hidden_layers": 40, "hidden_size": 1024}})
    whole = predict(model, Setup(batch=1))
    for shards in (2, 8):
        found = predict(model, Setup(batch=1, shards=shards))
        for part in ("unquantized", "adapter", "gradients", "optimizer"):
            assert getattr(found, part) == -(-getattr(whole, part) // shards)
        assert whole.base / shards < found.base < 1.05 * whole.base / shards + whole.base / 25  # scales stay whole
        assert (found.activations, found.logits) == (whole.activations, whole.logits)
        assert found.workspace > whole.workspace
        assert found.total < whole.total
    train = TrainParams(max_steps=1, processes=4, sharding="full")
    assert setup_from(train, ModelParams(), length=128).shards == 4
    assert setup_from(train.model_copy(update={"sharding": "none"}), ModelParams(), length=128).shards == 1


def test_preferences_send_both_answers_of_a_row_through_the_model() -> None:
    plain = TrainParams(max_steps=1, batch_size=4)
    found = {
        objective: setup_from(plain.model_copy(update={"objective": objective}), ModelParams(), length=256, trained=0.5)
        for objective in ("supervised", "dpo", "kto", "orpo")
    }

    assert {name: each.tokens for name, each in found.items()} == {
        "supervised": 1024, "dpo": 2048, "kto": 2048, "orpo": 2048,
    }  # fmt: skip
    assert [name for name, each in found.items() if each.chunk is not None] == ["dpo", "kto"]
    assert (found["orpo"].trained, found["dpo"].trained, found["supervised"].batch) == (1.0, 0.5, 4)
    assert [name for name, each in found.items() if each.least_batch == 2] == ["kto"]
