"""Packing must not change what is learned: losses and gradients of packed blocks against single documents."""

from pathlib import Path
from typing import Any

import pytest

DOCUMENTS = [
    ([11, 12, 13, 14, 15, 16], [-100, -100, -100, 14, 15, 16]),
    ([21, 22, 23], [-100, 22, 23]),
    ([31, 32, 33, 34, 35, 36, 37, 38], [-100, -100, 33, 34, -100, -100, 37, 38]),
    ([41, 42], [-100, 42]),
    ([51, 52, 53, 54, 55], [-100, -100, 53, -100, 55]),
]


def _model(folder: Path, attention: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention)


def _block(documents: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for ids, _ in documents for token in ids],
        "labels": [label for _, labels in documents for label in labels],
        "position_ids": [position for ids, _ in documents for position in range(len(ids))],
    }


def _unpacked(model: Any) -> tuple[float, list[Any]]:
    """Loss and gradients by the model's own loss, each document alone and without positions or padding."""
    import torch

    model.zero_grad()
    total = 0.0
    for ids, labels in DOCUMENTS:
        trained = sum(label != -100 for label in labels[1:])
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * trained
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([DOCUMENTS], id="one block"),
        pytest.param([DOCUMENTS[:2], DOCUMENTS[2:]], id="two blocks, one of them padded"),
        pytest.param([[document] for document in DOCUMENTS], id="a document each, padded"),
    ],
)
def test_packed_losses_and_gradients_equal_those_of_documents_alone(
    tiny_base: Path, attention: str, blocks: list[Any]
) -> None:
    import torch

    from regraft.train.data import collate
    from regraft.train.loss import summed_loss

    model = _model(tiny_base, attention)
    expected, gradients = _unpacked(model)

    model.zero_grad()
    loss = summed_loss(model, collate([_block(block) for block in blocks], pad_id=0))
    loss.backward()

    assert loss.item() == pytest.approx(expected, rel=2e-7)  # the loss itself is summed in fp32
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=2e-6)  # norms and softmax are fp32 inside


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_forward_pass_asks_for_no_value_that_a_gpu_has_still_to_compute(
    tiny_base: Path, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.model import attention
    from regraft.train.data import collate
    from regraft.train.loss import chunked_loss, summed_loss

    def kernel(query: Any, key: Any, value: Any, ends: Any, longest: int, scale: Any, window: Any) -> Any:
        assert isinstance(longest, int)
        return query + (key + value).repeat_interleave(query.shape[1] // key.shape[1], 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this would wait for the GPU")

    monkeypatch.setattr(attention, "_kernel", kernel)
    attention.register()
    batch = collate([_block(DOCUMENTS), _block(DOCUMENTS[:3])], pad_id=0)
    model = _model(tiny_base, attention.VARLEN).requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    for name in ("nonzero", "item", "tolist", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    loss = summed_loss(model, batch) if chunk is None else chunked_loss(model, batch, chunk)
    loss.backward()


def test_logits_are_computed_for_trained_tokens_only(tiny_base: Path) -> None:
    from regraft.train.data import collate
    from regraft.train.loss import summed_loss

    model = _model(tiny_base, "sdpa")
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))

    summed_loss(model, collate([_block(DOCUMENTS)], pad_id=0))
    handle.remove()

    assert shapes == [(12, 400)]
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_the_whole(tiny_base: Path, chunk: int) -> None:
    import torch

    from regraft.train.data import collate
    from regraft.train.loss import can_chunk, chunked_loss, summed_loss

    model = _model(tiny_base, "sdpa")
    assert can_chunk(model, 0)
    batch = collate([_block(DOCUMENTS), _block(DOCUMENTS[:3])], pad_id=0)
    found = []
    for loss in (summed_loss(model, batch), chunked_loss(model, batch, chunk)):
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), [parameter.grad.clone() for parameter in model.parameters()]))

    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert not model.lm_head._forward_pre_hooks


def test_no_chunk_has_more_logits_than_asked_for(tiny_base: Path) -> None:
    from regraft.train.data import collate
    from regraft.train.loss import chunked_loss

    model = _model(tiny_base, "sdpa")
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))

    chunked_loss(model, collate([_block(DOCUMENTS)], pad_id=0), chunk=5).backward()
    handle.remove()

    assert sorted(set(rows)) == [0, 2, 5]  # 12 trained tokens, forward and again backward


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_the_loss_under_a_frozen_output_layer_and_its_gradients_are_those_of_the_whole(
    tiny_base: Path, chunk: int
) -> None:
    import torch

    from regraft.train.data import collate
    from regraft.train.loss import chunked_loss, summed_loss

    model = _model(tiny_base, "sdpa")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    batch = collate([_block(DOCUMENTS), _block(DOCUMENTS[:3])], pad_id=0)
    found = []
    for loss in (summed_loss(model, batch), chunked_loss(model, batch, chunk)):
        model.zero_grad()
        (0.25 * loss).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((loss.item(), [parameter.grad.clone() for parameter in trained]))

    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert chunked_loss(model, batch, chunk).item() == found[1][0]


def test_in_bf16_a_frozen_output_layer_gives_gradients_as_near_as_autocasts() -> None:
    import torch

    from regraft.train.logits import FrozenLoss, works_on

    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Linear(64, 2000, bias=False).requires_grad_(False)
    torch.nn.init.normal_(layer.weight, std=0.3, generator=generator)
    states = torch.randn(300, 64, generator=generator).bfloat16()
    labels = torch.randint(2000, (300,), generator=generator)

    def gradient(loss: Any, x: Any) -> Any:
        x = x.detach().requires_grad_()
        loss(x).div(300).backward()
        return x.grad.double()

    def whole(x: Any) -> Any:
        return torch.nn.functional.cross_entropy(layer(x).float(), labels, reduction="sum")

    layer = layer.bfloat16().float()
    exact = gradient(
        lambda x: torch.nn.functional.cross_entropy(layer.double()(x), labels, reduction="sum"), states.double()
    )
    layer = layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = gradient(whole, states)
        own = gradient(lambda x: FrozenLoss.apply(x, labels, layer, 64, torch.bfloat16), states)
    errors = [float((each - exact).norm() / exact.norm()) for each in (theirs, own)]
    assert errors[1] < 1.2 * errors[0] < 0.02
    assert works_on(layer, torch.bfloat16)
    assert not works_on(layer, torch.float16)  # too small a gradient for its range


def test_a_frozen_output_layer_multiplies_by_its_weights_twice_and_holds_one_chunk() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from regraft.train.logits import FrozenLoss

    layer = torch.nn.Linear(16, 100).requires_grad_(False)
    states, labels = torch.randn(30, 16, requires_grad=True), torch.arange(30)
    kept: list[int] = []
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        FrozenLoss.apply(states, labels, layer, 8, torch.float32).backward()
    assert counter.get_total_flops() == 2 * 2 * 30 * 16 * 100
    assert kept == [30 * 16]


def test_a_model_that_caps_its_logits_is_not_chunked() -> None:
    from types import SimpleNamespace

    from regraft.train.loss import can_chunk

    config = SimpleNamespace(final_logit_softcapping=30.0)
    config.get_text_config = lambda: config
    assert not can_chunk(SimpleNamespace(config=config), 0)
