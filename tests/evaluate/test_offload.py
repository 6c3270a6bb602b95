"""An int8 base of which some layers lie in the host's memory: the real placement and hooks, with a CPU for the GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import ParamsError
from regraft.evaluate.evaluate import evaluate
from regraft.evaluate.params import EvaluateParams
from regraft.model.params import ModelParams, Quantization
from regraft.train.params import TrainParams

INT8 = Quantization(bits=8)
GIB = 2**30


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand for a GPU: what lies on it is int8, what is offloaded from it is not."""
    import torch

    from regraft.model import load

    monkeypatch.setattr(load, "_gpu", lambda: torch.device("cpu"))


@pytest.fixture
def sizes(tiny_base: Path) -> dict[str, int]:
    """Bytes of the tiny base's tied embedding, and of one layer in int8 with its norms."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(tiny_base)
    width = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    layer = 2 * c.hidden_size**2 + 2 * c.hidden_size * width + 3 * c.hidden_size * c.intermediate_size
    return {"embedding": 4 * c.vocab_size * c.hidden_size, "layer": layer + 8 * c.hidden_size}


def loaded(place: Any, gpu_memory: float | None) -> Any:
    from regraft.model.load import load_model, open_base

    return load_model(open_base(place.base), INT8, training=False, gpu_memory=gpu_memory)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).repeat(2, 1)).logits


def kinds(model: Any) -> list[bool]:
    """Of each layer, whether it was offloaded."""
    return [layer.self_attn.q_proj.weight.is_meta for layer in model.model.layers]


def test_layers_go_to_the_host_from_the_last_on_until_the_rest_fits(tiny_base: Path, sizes: dict[str, int]) -> None:
    import torch
    from transformers import AutoConfig

    from regraft.model.load import placed

    config, gpu = AutoConfig.from_pretrained(tiny_base), torch.device("cuda", 0)
    config.num_hidden_layers = 6
    found = placed(config, INT8, sizes["embedding"] + 4 * sizes["layer"], gpu)  # room for the largest is kept free
    layers = [found.get(f"model.layers.{n}", found.get("model.layers")) for n in range(6)]
    assert (layers[0], layers[-1]) == (gpu, "cpu")
    assert layers == sorted(layers, key=lambda where: where == "cpu")
    assert set(placed(config, INT8, GIB, gpu).values()) == {gpu}
    with pytest.raises(ParamsError, match=r"evaluate\.gpu_memory: 0\.00 GiB hold no part of this base"):
        placed(config, INT8, 1000, gpu)


@pytest.mark.usefixtures("pretended")
def test_an_adapter_acts_on_offloaded_layers_too(place: Any, sizes: dict[str, int]) -> None:
    import torch

    from regraft.model.adapter import load_adapter, take_off

    budget = (sizes["embedding"] + 2 * sizes["layer"]) / GIB
    whole, spread = loaded(place, None), loaded(place, budget)
    assert (kinds(whole), kinds(spread)) == ([False, False], [False, True])
    assert whole.model.layers[1].self_attn.q_proj.weight.dtype == torch.int8
    assert spread.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    plain = logits(spread)
    expected, found = (logits(load_adapter(model, place.adapter)) for model in (whole, spread))
    assert float((found - expected).norm() / expected.norm()) < 0.05  # the offloaded layer is not rounded to 8 bits
    assert float((found - plain).norm() / plain.norm()) > 0.2
    assert torch.equal(logits(take_off(load_adapter(loaded(place, budget), place.adapter))), plain)


@pytest.mark.usefixtures("pretended")
def test_evaluation_scores_an_offloaded_base_as_it_does_a_whole_one(
    place: Any, sizes: dict[str, int], tmp_path: Path
) -> None:
    losses = []
    for name, memory in (("whole", None), ("spread", (sizes["embedding"] + 2 * sizes["layer"]) / GIB)):
        params = EvaluateParams(max_new_tokens=4, threads=1, gpu_memory=memory)
        made = evaluate(
            params, INT8, base=place.base, dataset=place.dataset, adapters={"a": place.adapter}, out=tmp_path / name
        )
        losses.append([made.scores[each].overall.loss for each in ("base", "a")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


@pytest.mark.usefixtures("pretended")
def test_training_refuses_a_base_that_is_spread(
    place: Any, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.model.load import load_model, open_base
    from regraft.train import adapt

    base = open_base(place.base)
    with pytest.raises(ParamsError, match=r"evaluate\.gpu_memory: found it for training"):
        load_model(base, INT8, training=True, gpu_memory=1.0)
    spread = loaded(place, (sizes["embedding"] + 2 * sizes["layer"]) / GIB)
    monkeypatch.setattr(adapt, "load_model", lambda *_, **__: spread)
    params = TrainParams(max_steps=1)
    with pytest.raises(ParamsError, match=r"a base spread over cpu.* is for evaluation only; training wants it whole"):
        adapt.make_trainee(params, ModelParams(quantization=INT8), base, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 16])
def test_only_an_int8_base_is_offloaded(place: Any, bits: int) -> None:
    from regraft.model.load import load_model, open_base

    with pytest.raises(ParamsError, match=f"found it with {bits} bits, expected it only with .*bits 8"):
        load_model(open_base(place.base), Quantization(bits=bits), training=False, gpu_memory=1.0)


@pytest.mark.usefixtures("pretended")
def test_what_an_adapter_has_beside_a_and_b_is_refused_on_offloaded_layers(
    place: Any, sizes: dict[str, int], tmp_path: Path, tiny_base: Path, adapter_of: Callable[..., Path]
) -> None:
    from regraft.model.adapter import load_adapter

    folder = adapter_of(tmp_path / "dora", seed=2, dora=True)
    spread = loaded(place, (sizes["embedding"] + 2 * sizes["layer"]) / GIB)
    with pytest.raises((ParamsError, NotImplementedError)):
        load_adapter(spread, folder)
