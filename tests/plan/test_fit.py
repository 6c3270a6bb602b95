"""What fits a card, in the order of the guide, and how it gets into params.yaml."""

from pathlib import Path
from typing import Any

import pytest

from regraft import settings
from regraft.errors import ParamsError
from regraft.layout import Layout
from regraft.plan.apply import apply
from regraft.plan.architecture import architecture
from regraft.plan.cards import GIB, card_named, card_of_size
from regraft.plan.compare import RANKS, TARGETS, grid, grid_lines, method_lines, methods
from regraft.plan.fit import HEADROOM, fit, settings_of
from regraft.plan.memory import predict
from regraft.plan.observations import Correction
from regraft.plan.setup import Setup

ROOT = Path(__file__).parent.parent.parent
LLAMA_8B = architecture(
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
WANTED = Setup(batch=8, accumulation=2, length=1024, rank=16, optimizer="adamw_torch_fused", trained=0.3)


def test_a_card_on_which_everything_fits_gets_16_bits_and_gives_up_nothing() -> None:
    found = fit(LLAMA_8B, WANTED, 180 * GIB)
    assert (found.fits, found.setup) == (True, WANTED.but(bits=16))
    assert [step.gives_up for step in found.steps] == ["nothing"]


@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 40, 48, 80, 141])
def test_what_is_chosen_fits_what_came_before_did_not_and_a_step_sees_the_same_tokens(gib: int) -> None:
    found = fit(LLAMA_8B, WANTED, gib * GIB)
    assert [step.fits for step in found.steps] == [False] * (len(found.steps) - 1) + [found.fits]
    assert found.total == predict(LLAMA_8B, found.setup).total
    assert (found.total <= gib * GIB * (1 - HEADROOM)) == found.fits
    assert found.setup.batch * found.setup.accumulation == 16


def test_a_batch_keeps_the_rows_that_its_objective_needs() -> None:
    found = fit(LLAMA_8B, WANTED.but(least_batch=2, answers=2), 6 * GIB)
    assert (found.setup.batch, found.setup.accumulation) == (2, 8)


def test_a_smaller_card_never_gets_more() -> None:
    totals = [fit(LLAMA_8B, WANTED, gib * GIB).total for gib in (6, 8, 12, 16, 24, 40, 48, 80, 141)]
    assert totals == sorted(totals)


def test_the_steps_come_in_the_order_of_the_guide() -> None:
    told = " | ".join(step.change for step in fit(LLAMA_8B, WANTED, GIB).steps)
    marks = ["16-bit base", "NF4 (QLoRA)", "NF4, micro-batch 1", "logits of 256", "16 bits, gradient checkpointing"]
    marks += ["| gradient checkpointing", "paged", "sequences of 512", "rank 8"]
    places = [told.index(mark) for mark in marks]
    assert places == sorted(places)


def test_a_16_bit_base_with_recomputed_activations_comes_before_a_4_bit_one_with_them() -> None:
    long = WANTED.but(batch=1, length=32768, trained=0.02)
    found = fit(LLAMA_8B, long, 50 * GIB)
    assert (found.fits, found.setup.bits, found.setup.checkpointing) == (True, 16, True)
    assert not any(step.fits for step in found.steps[:-1])


def test_logits_in_chunks_are_tried_before_activations_are_recomputed_where_they_save_something() -> None:
    wide = WANTED.but(batch=1, length=4096, trained=1.0)
    limit = predict(LLAMA_8B, wide.but(bits=4, chunk=256)).total / (1 - HEADROOM) + 1
    found = fit(LLAMA_8B, wide, int(limit))
    assert (found.setup.bits, found.setup.chunk, found.setup.checkpointing) == (4, 256, False)
    assert settings_of(wide, found.setup, alpha=32, max_length=4096)["train.logits_chunk"] == 256
    few = fit(LLAMA_8B, wide.but(trained=0.01), GIB)
    assert not any("logits" in step.change for step in few.steps)


def test_where_nothing_fits_the_smallest_is_told() -> None:
    found = fit(LLAMA_8B, WANTED, GIB)
    assert not found.fits
    assert (found.setup.bits, found.setup.batch, found.setup.rank, found.setup.length) == (4, 1, 4, 256)


def test_full_fine_tuning_stays_full() -> None:
    found = fit(LLAMA_8B, WANTED.but(method="full", bits=32), 180 * GIB)
    assert (found.setup.method, found.setup.bits) == ("full", 32)


def test_what_was_measured_on_such_a_card_changes_what_fits() -> None:
    plain = fit(LLAMA_8B, WANTED, 24 * GIB)
    wary = fit(LLAMA_8B, WANTED, 24 * GIB, Correction("card", 1.9, 3))
    assert len(wary.steps) > len(plain.steps)


def test_a_smaller_rank_keeps_the_adapters_scale() -> None:
    changed = settings_of(WANTED, WANTED.but(rank=4, batch=1, accumulation=16, length=512), alpha=32, max_length=1024)
    assert changed == {
        "train.rank": 4,
        "train.alpha": 8.0,
        "train.batch_size": 1,
        "train.accumulation": 16,
        "preprocess.block_length": 512,
        "preprocess.max_length": 512,
    }


def test_applied_values_are_valid_and_no_other_byte_of_the_shipped_params_changes(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text()
    file.write_text(before)
    values = {"train.rank": 4, "train.alpha": 8.0, "train.batch_size": 1, "train.optimizer": "paged_adamw_8bit"}
    apply(file, {**values, "train.gradient_checkpointing": True, "model.quantization.bits": 16})
    found = settings.load(Layout(tmp_path))
    assert (found.train.rank, found.train.alpha, found.train.batch_size) == (4, 8, 1)
    assert (found.train.optimizer, found.train.gradient_checkpointing) == ("paged_adamw_8bit", True)
    assert found.model.quantization.bits == 16
    pairs = list(zip(before.splitlines(), file.read_text().splitlines(), strict=True))
    changed = [(old, new) for old, new in pairs if old != new]
    assert len(changed) == 6
    for old, new in changed:
        assert old.partition("#")[2] == new.partition("#")[2] != ""
        assert old.index("#") == new.index("#") or "paged" in new


@pytest.mark.parametrize("text", ["train: {rank: 8}\n", "train:\n  epochs: 1\n", "train: 3\n", "train:\n  rank: [1]\n"])
def test_a_key_that_does_not_stand_there_plainly_is_an_error_and_nothing_is_written(text: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ParamsError, match=r"no plain value at train\.rank"):
        apply(file, {"train.rank": 4})
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("size", "expected"),
    [("6GiB", 6 * GIB), ("6", 6 * GIB), ("8192 MiB", 8 * GIB), ("6gb", 6 * 10**9), ("1.5g", 1.5 * GIB)],
)
def test_a_size_is_read_in_the_units_of_the_field(size: str, expected: float) -> None:
    assert card_of_size(size).bytes == expected


@pytest.mark.parametrize("size", ["", "six", "0", "6 bananas", "-1GiB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ParamsError, match="expected a size such as 6GiB"):
        card_of_size(size)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("rtx2060", False),
        ("t4", False),
        ("Tesla T4", False),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("v100-32gb", False),
        ("gtx1660", False),
        ("NVIDIA GeForce RTX 4090", True),
        ("rtx3050", True),
        ("NVIDIA H200", True),
        ("6 GiB", True),
        ("NVIDIA L4", True),
        ("a40", True),
        ("rtx4060ti", True),
    ],
)
def test_a_card_before_ampere_computes_in_fp16_and_holds_the_rest_of_its_base_in_fp32(name: str, bf16: bool) -> None:
    from regraft.model.params import ModelParams
    from regraft.plan.cards import Card
    from regraft.plan.setup import setup_from
    from regraft.train.params import TrainParams

    card = Card(name, GIB)
    assert card.bf16 is bf16
    setup = setup_from(TrainParams(max_steps=1), ModelParams(), length=128, bf16=card.bf16)
    assert setup.unquantized_fp32 is not bf16
    assert not setup_from(
        TrainParams(max_steps=1), ModelParams(), length=128, on_gpu=False, bf16=False
    ).unquantized_fp32


def test_a_card_is_known_by_any_usual_spelling() -> None:
    assert card_named("NVIDIA GeForce RTX 3050").bytes == card_named("rtx3050").bytes == 8 * GIB
    with pytest.raises(ParamsError, match=r"no card 'voodoo2' in the table: rtx2060"):
        card_named("voodoo2")


def test_the_table_of_methods_is_ordered_as_the_field_knows_it() -> None:
    found: dict[str, Any] = dict(methods(LLAMA_8B, WANTED.but(batch=1)))
    weights = [found[name].base for name in ("full", "LoRA, 16 bits", "LoRA, int8", "QLoRA, NF4")]
    assert weights == sorted(weights, reverse=True)
    assert found["full"].total > found["LoRA, 16 bits"].total
    for name in ("full", "LoRA, 16 bits", "LoRA, int8", "QLoRA, NF4"):
        assert found[f"{name}, checkpointing"].total < found[name].total
    assert len(method_lines(list(found.items()))) == 9


def test_trained_parameters_grow_in_proportion_to_the_rank() -> None:
    rows = grid(LLAMA_8B, WANTED)
    trained = {(targets, rank): found.trainable for targets, rank, found in rows}
    assert len(trained) == len(RANKS) * len(TARGETS)
    assert trained["all-linear", 16] == 41_943_040  # the figure that PEFT prints for this model
    assert trained["q+v", 8] == 3_407_872
    for targets in TARGETS:
        assert trained[targets, 64] == 16 * trained[targets, 4]
    assert trained["all-linear", 8] == trained["attention", 8] + trained["mlp", 8]
    assert len(grid_lines(rows)) == len(TARGETS) + 1
