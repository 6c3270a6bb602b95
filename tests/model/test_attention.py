"""Which kernel is chosen, and that the variable-length path sees each document alone.

The kernel itself needs a GPU: here its place is taken by the textbook's formula, so that what is tested is everything
around it; the last test compares the real one where there is a GPU.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from regraft.errors import ParamsError

CONFIG = SimpleNamespace(hidden_size=64, num_attention_heads=4)
CONFIG.get_text_config = lambda: CONFIG


@pytest.mark.parametrize(("attention", "expected"), [("sdpa", "sdpa"), ("eager", "eager"), ("auto", "sdpa")])
def test_on_a_cpu_auto_is_sdpa(attention: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from regraft.model.attention import implementation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert implementation(attention, training=True, dtype=torch.float32, config=CONFIG) == expected


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_a_kernel_that_needs_a_gpu_is_refused_by_name_and_left_out_of_evaluation(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.model.attention import implementation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match=f"found {attention}"):
        implementation(attention, training=True, dtype=torch.float32, config=CONFIG)
    assert implementation(attention, training=False, dtype=torch.float32, config=CONFIG) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "dtype", "changes", "expected"),
    [
        ((9, 0), "bfloat16", {}, "regraft_varlen"),
        ((7, 5), "float16", {}, "sdpa"),
        ((9, 0), "float32", {}, "sdpa"),
        ((9, 0), "bfloat16", {"head_dim": 512}, "sdpa"),
        ((9, 0), "bfloat16", {"attn_logit_softcapping": 50.0}, "sdpa"),
    ],
)
def test_auto_takes_the_variable_length_kernel_where_gpu_and_model_can(
    capability: tuple[int, int], dtype: str, changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regraft.model.attention import implementation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("regraft.model.attention._trial", lambda *_: None)
    config = SimpleNamespace(**vars(CONFIG) | changes)
    config.get_text_config = lambda: config
    assert implementation("auto", training=True, dtype=getattr(torch, dtype), config=config) == expected


def test_a_kernel_that_fails_its_trial_is_not_chosen_and_by_name_the_error_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from regraft.model import attention

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "_trial", lambda *_: "its kernel fails here: no such argument")
    assert attention.implementation("auto", training=True, dtype=torch.bfloat16, config=CONFIG) == "sdpa"
    with pytest.raises(ParamsError, match="found varlen, but its kernel fails here: no such argument"):
        attention.implementation("varlen", training=True, dtype=torch.bfloat16, config=CONFIG)


def _takes(**names: Any) -> Any:
    """A stand-in for torch's kernel with the parameters of one version."""
    import inspect

    def kernel(q: Any, k: Any, v: Any, ends: Any, _ends: Any, longest: int, _longest: int, **given: Any) -> Any:
        assert given.keys() <= names.keys(), f"unexpected keyword arguments {given.keys() - names.keys()}"
        assert q.shape[1] == k.shape[1] or given.get("enable_gqa", "enable_gqa" not in names)
        return _textbook(q, k, v, ends, longest, given["scale"], given["window_size"])

    keyword = inspect.Parameter.KEYWORD_ONLY
    kernel.__signature__ = inspect.Signature([inspect.Parameter(name, keyword) for name in names])  # type: ignore[attr-defined]
    return kernel


@pytest.mark.parametrize("names", [("scale", "window_size"), ("scale", "window_size", "enable_gqa")])
def test_heads_in_groups_pass_the_trial_with_the_arguments_of_either_version_of_torch(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.nn.attention.varlen

    from regraft.model.attention import _trial

    trial = _trial.__wrapped__
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _takes(**dict.fromkeys(names)))
    assert trial(8, 2, 16, torch.float32, "cpu") is None
    assert trial(4, 4, 16, torch.float32, "cpu") is None
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda q, k, v, *_: q)
    assert "fails here: " in (trial(8, 2, 16, torch.float32, "cpu") or "")  # an argument that it does not know
    monkeypatch.setattr(
        torch.nn.attention.varlen,
        "varlen_attn",
        lambda q, k, v, *_, **__: q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], 1),
    )
    assert "something else than SDPA" in (trial(8, 2, 16, torch.float32, "cpu") or "")


def test_the_real_kernel_of_this_torch_knows_every_argument_that_it_is_given() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


def test_boundaries_are_where_positions_restart_padding_and_blocks_included() -> None:
    import torch

    from regraft.model.attention import boundaries

    found = boundaries(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == 3


def _textbook(query: Any, key: Any, value: Any, ends: Any, longest: int, scale: float | None, window: Any) -> Any:
    """softmax(QKᵀ/√d)V, document by document."""
    import torch

    assert window == (-1, 0)
    assert longest == int(ends.diff().max())
    groups = query.shape[1] // key.shape[1]
    out = []
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q = query[first:last].transpose(0, 1)
        k, v = (t[first:last].transpose(0, 1).repeat_interleave(groups, 0) for t in (key, value))
        scores = q @ k.transpose(1, 2) * (scale or 1 / math.sqrt(q.shape[-1]))
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def test_losses_and_gradients_through_it_equal_those_under_a_mask_in_float64(
    tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from regraft.model import attention
    from regraft.train.data import collate
    from regraft.train.loss import summed_loss

    monkeypatch.setattr(attention, "_kernel", _textbook)
    attention.register()
    rows = [
        {"input_ids": list(range(5, 17)), "labels": [-100, *range(6, 17)], "position_ids": [*range(5), *range(7)]},
        {"input_ids": list(range(30, 38)), "labels": [-100, *range(31, 38)], "position_ids": [*range(2), *range(6)]},
    ]
    found = []
    for kernel in ("sdpa", attention.VARLEN):
        model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float64, attn_implementation=kernel)
        loss = summed_loss(model, collate(rows, pad_id=0))
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in model.parameters()]))

    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_the_real_kernel_equals_sdpa_under_a_mask_in_bf16(tiny_base: Any) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from regraft.model import attention
    from regraft.train.data import collate, moved
    from regraft.train.loss import summed_loss

    attention.register()
    row = {"input_ids": list(range(5, 69)), "labels": [-100, *range(6, 69)], "position_ids": [*range(30), *range(34)]}
    batch = moved(collate([row, row], pad_id=0), torch.device("cuda"))
    losses = []
    for kernel in ("sdpa", attention.VARLEN):
        model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, attn_implementation=kernel).cuda()
        losses.append(summed_loss(model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
