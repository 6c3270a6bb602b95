import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DamagedArtifact, MissingInput, PinMismatch
from regraft.model.load import Base, load_model, load_tokenizer, open_base
from regraft.model.params import ModelParams, Quantization
from regraft.model.pin import pin


@pytest.fixture
def pinned(tiny_base: Path, tmp_path: Path) -> Path:
    """A pinned base whose files a test may alter, in tmp_path/base."""
    shutil.copytree(tiny_base, tmp_path / "base")
    pin(ModelParams(base=str(tmp_path / "base")), corpus=tmp_path, out=tmp_path / "model")
    return tmp_path / "model"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_altered_weight_is_refused_with_both_digests(pinned: Path) -> None:
    base = open_base(pinned)
    _flip(base.folder / "model.safetensors")

    with pytest.raises(PinMismatch, match=r"the base model .* pinned .*differing: model\.safetensors") as refusal:
        open_base(pinned)
    assert base.report.digest in refusal.value.message


def test_an_altered_chat_template_is_refused_though_the_weights_are_not_read(pinned: Path) -> None:
    base = open_base(pinned)
    (base.folder / "chat_template.jinja").write_text("{{ messages }}")

    with pytest.raises(PinMismatch, match=r"the tokenizer .*chat_template\.jinja"):
        open_base(pinned, weights=False)


def test_a_file_added_after_pinning_is_refused(pinned: Path) -> None:
    base = open_base(pinned)
    shutil.copy(base.folder / "model.safetensors", base.folder / "extra.safetensors")

    with pytest.raises(PinMismatch, match=r"differing: extra\.safetensors"):
        open_base(pinned)


def test_code_named_after_pinning_is_refused(pinned: Path) -> None:
    config = open_base(pinned).folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoConfig": "evil.Config"}}))

    with pytest.raises(DamagedArtifact, match="auto_map"):
        open_base(pinned)


def test_an_unpinned_base_names_the_command_that_pins_it(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="dvc repro model"):
        open_base(tmp_path)


def test_the_tokenizer_comes_with_its_template_and_stop_token(pinned: Path) -> None:
    tokenizer = load_tokenizer(open_base(pinned))

    assert tokenizer.eos_token == "<|im_end|>"
    assert "im_start" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("quantization", "kinds"),
    [
        (None, {"Linear"}),
        (Quantization(bits=16), {"Linear"}),
        (Quantization(bits=8), {"Linear8bitLt", "Linear"}),
        (Quantization(bits=4), {"Linear4bit", "Linear"}),
    ],
)
def test_each_width_quantises_all_linear_layers_but_the_output(
    pinned: Path, quantization: Quantization | None, kinds: set[str]
) -> None:
    model = load_model(open_base(pinned), quantization, training=False)

    linear = {name: type(m).__name__ for name, m in model.named_modules() if type(m).__name__.startswith("Linear")}
    assert set(linear.values()) == kinds
    assert [name for name, kind in linear.items() if kind == "Linear" and kinds != {"Linear"}] in ([], ["lm_head"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_named_modules_stay_unquantised_and_so_does_the_output(pinned: Path) -> None:
    model = load_model(open_base(pinned), Quantization(skip_modules=["q_proj"]), training=False)

    plain = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert plain == {"q_proj", "lm_head"}


def test_a_forward_without_gradients_leaves_4_bit_weights_as_they_were(pinned: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    def weights(model: Any) -> list[Any]:
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        return [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]

    model = load_model(open_base(pinned), Quantization(compute_dtype="bf16"), training=False)
    before = weights(model)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))

    assert len(before) == 14
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


def test_4_bit_weights_stay_close_to_the_stored_ones(pinned: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    base: Base = open_base(pinned)
    layer = load_model(base, Quantization(), training=True).model.layers[0].mlp.up_proj
    stored = load_model(base, None, training=False).model.layers[0].mlp.up_proj.weight
    error = dequantize_4bit(layer.weight.data, layer.weight.quant_state) - stored

    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert (torch.norm(error) / torch.norm(stored)).item() < 0.12
