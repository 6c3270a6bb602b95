"""What is refused before anything of an adapter is loaded, and that what is loaded is what was saved."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DamagedArtifact, MissingInput
from regraft.model.adapter import adapter_digest, check_adapter, load_adapter, save_adapter
from regraft.model.header import read_header
from regraft.model.load import open_base
from regraft.model.params import ModelParams
from regraft.model.pin import pin

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "model"
    pin(ModelParams(base=str(tiny_base)), corpus=folder, out=folder)
    return open_base(folder)


def _fresh_model(base: Any) -> Any:
    from regraft.model.load import load_model

    return load_model(base, None, training=False)


@pytest.fixture(scope="module")
def trained(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter whose B is random, and the logits of the model that it was saved from."""
    import torch
    from peft import LoraConfig

    from regraft.model.adapter import adapter_parameters, attach

    torch.manual_seed(1)
    model = attach(
        _fresh_model(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(model, folder, base_name="some/base")
    with torch.no_grad():
        return folder, model.eval()(torch.tensor([[5, 6, 7]])).logits


@pytest.fixture
def adapter(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def _edit(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _retensor(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def _reheader(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_what_is_loaded_computes_what_was_saved(base: Any, trained: tuple[Path, Any]) -> None:
    import torch

    with torch.no_grad():
        logits = load_adapter(_fresh_model(base), trained[0])(torch.tensor([[5, 6, 7]])).logits

    assert torch.equal(logits, trained[1])


def test_a_second_adapter_goes_beside_the_first_and_the_base_is_still_there(
    base: Any, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    import torch

    tokens = torch.tensor([[5, 6, 7]])
    plain = _fresh_model(base)
    with torch.no_grad():
        expected = plain(tokens).logits
        other = Path(shutil.copytree(trained[0], tmp_path / "other"))
        _retensor(other, lambda tensors: tensors.update({name: 2 * value for name, value in tensors.items()}))
        model = load_adapter(load_adapter(plain, other, name="champion"), trained[0], name="challenger")
        assert torch.equal(model(tokens).logits, trained[1])
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.set_adapter("champion")
        assert not torch.equal(model(tokens).logits, trained[1])
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, expected)


# peft 0.21 asks transformers 5.23 for an attribute by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_equal_adapters_are_saved_as_equal_bytes_that_peft_reads(
    base: Any, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    digest = save_adapter(load_adapter(_fresh_model(base), trained[0]), tmp_path / "again", base_name="some/base")

    assert digest == adapter_digest(trained[0])
    model = PeftModel.from_pretrained(_fresh_model(base), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, trained[1])


def test_a_checked_adapter_is_described_without_loading_it(trained: tuple[Path, Any]) -> None:
    adapter = check_adapter(trained[0])

    assert (adapter.rank, adapter.scaling, adapter.targets) == (2, 2.0, ("q_proj", "up_proj"))
    assert adapter.modules["model.layers.1.mlp.up_proj"] == (128, 64)
    assert len(adapter.modules) == 4
    assert adapter.zero_b == ()
    assert adapter.digest == adapter_digest(trained[0])


def test_a_bf16_adapter_is_checked_too(base: Any, trained: tuple[Path, Any], tmp_path: Path) -> None:
    model = load_adapter(_fresh_model(base), trained[0])
    save_adapter(model, tmp_path / "adapter", base_name="b", dtype="bf16")

    assert {tensor.dtype for tensor in check_adapter(tmp_path / "adapter").tensors.values()} == {"BF16"}

    path = tmp_path / "adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="not finite"):
        check_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "modeling.py", "evil.pkl"])
def test_any_other_file_beside_it_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(b"\x80\x04")

    with pytest.raises(DamagedArtifact, match=name):
        check_adapter(adapter)


def test_a_pickle_in_place_of_the_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")

    with pytest.raises(DamagedArtifact, match=r"adapter_model\.bin"):
        check_adapter(adapter)


def test_a_link_is_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (adapter / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(DamagedArtifact, match=r"adapter_config\.json"):
        check_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()

    with pytest.raises(MissingInput, match=name.replace(".", r"\.")):
        check_adapter(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "Model", "parent_library": "os"}},
        {"megatron_config": {"a": 1}},
        {"megatron_core": "antigravity"},
        {"peft_type": "PROMPT_TUNING"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": "yes"},
        {"layer_replication": [[0, 1]]},
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": "9"}},
        {"trainable_token_indices": [-1]},
        {"modules_to_save": ["../lm_head"]},
        {"target_modules": "(a+)+$"},
        {"target_modules": []},
        {"base_model_name_or_path": "/etc/model"},
        {"base_model_name_or_path": "../../model"},
        {"r": "2"},
        {"r": True},
        {"lora_alpha": float("inf")},
        {"something_new": {"class": "evil.Class"}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_configuration_of_anything_but_plain_lora_is_refused(adapter: Path, changes: dict[str, Any]) -> None:
    _edit(adapter, **changes)

    with pytest.raises(DamagedArtifact, match=next(iter(changes))):
        check_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: b"[" * 100_000, "not JSON"),
        (lambda header: header.update({"../../x": header.pop(f"{LAYER}.lora_A.weight")}), "tensor named"),
        (lambda header: header.update({"/etc/x": header.pop(f"{LAYER}.lora_A.weight")}), "tensor named"),
        (lambda header: header[f"{LAYER}.lora_A.weight"].update(shape=[2**40, 2**40]), "do not match"),
        (lambda header: header[f"{LAYER}.lora_A.weight"].update(dtype="F8"), "do not match"),
        (lambda header: header[f"{LAYER}.lora_A.weight"].pop("dtype"), "is not dtype"),
        (lambda header: header.pop(f"{LAYER}.lora_A.weight"), "starts at byte|end at byte"),
        (lambda header: (json.dumps(header)[:-1] + ', "a": {}, "a": {}}').encode(), "twice"),
        (lambda header: header.clear(), "0 tensors"),
        (lambda header: header.update({f"t{i}": {} for i in range(50_001)}), "tensors, expected"),
    ],
)
def test_an_absurd_header_is_refused(adapter: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    _reheader(adapter, change)

    with pytest.raises(DamagedArtifact, match=said):
        read_header(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("length", [2**63, 9_000_000, 10**6])
def test_a_header_longer_than_its_file_or_the_limit_is_not_read(adapter: Path, length: int) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    with pytest.raises(DamagedArtifact, match=f"a header of {length} bytes"):
        check_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_A.weight"), "q_proj has no A"),
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), "q_proj has no B"),
        (
            lambda t: t.update({"lm_head.weight": t[f"{LAYER}.lora_A.weight"]}),
            r"lm_head\.weight is not a tensor of an adapter",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[f"{LAYER}.lora_A.weight"]}),
            r"lm_head\.weight is not an A or B",
        ),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": t[f"{LAYER}.lora_A.weight"][:1]}), "rank 1 and 2"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": t[f"{LAYER}.lora_A.weight"].astype("f8")}), "is F64"),
        (lambda t: t[f"{LAYER}.lora_A.weight"].fill(float("nan")), "not finite"),
        (lambda t: t[f"{LAYER}.lora_B.weight"].fill(float("-inf")), "not finite"),
        (lambda t: [v.fill(0) for n, v in t.items() if "lora_B" in n], "B is zero in all 4 layers"),
    ],
)
def test_tensors_that_are_no_working_lora_are_refused(
    adapter: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    _retensor(adapter, change)

    with pytest.raises(DamagedArtifact, match=said):
        check_adapter(adapter)


def test_one_layer_whose_b_is_zero_is_reported_and_not_refused(adapter: Path) -> None:
    _retensor(adapter, lambda tensors: tensors[f"{LAYER}.lora_B.weight"].fill(0))

    assert check_adapter(adapter).zero_b == ("model.layers.0.self_attn.q_proj",)


def _rename(tensors: dict[str, Any], old: str, new: str) -> None:
    for half in "AB":
        tensors[f"{new}.lora_{half}.weight"] = tensors.pop(f"{old}.lora_{half}.weight")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: _retensor(a, lambda t: _rename(t, LAYER, LAYER.replace("0", "7"))), "layers.7.* is foreign"),
        (lambda a: _retensor(a, lambda t: _rename(t, LAYER, LAYER.replace("0", "7"))), "layers.0.* is missing"),
        (lambda a: _retensor(a, lambda t: _rename(t, LAYER, LAYER.replace("q_", "o_"))), "not among target_modules"),
        (lambda a: _edit(a, target_modules=["q_proj", "up_proj", "qkv"]), "qkv names no layer"),
        (lambda a: _edit(a, target_modules=["q_proj", "up_proj", "k_proj"]), "k_proj is missing"),
        (
            lambda a: _retensor(
                a, lambda t: t.update({f"{LAYER}.lora_A.weight": t[f"{LAYER}.lora_A.weight"][:, :32].copy()})
            ),
            r"is \(64, 32\), the base's \(64, 64\)",
        ),
    ],
)
def test_an_adapter_for_another_model_is_refused_before_the_model_is_touched(
    base: Any, adapter: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(adapter)
    model = _fresh_model(base)

    with pytest.raises(DamagedArtifact, match=said):
        load_adapter(model, adapter)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "q_proj has no magnitude"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj has rank 2 and 2, the configuration 4"),
        ({"modules_to_save": ["lm_head"]}, "lm_head of modules_to_save is missing"),
        ({"trainable_token_indices": [3]}, "embeddings of trainable_token_indices are missing"),
    ],
)
def test_a_configuration_that_asks_for_tensors_that_are_not_there_is_refused(
    adapter: Path, changes: dict[str, Any], said: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    with pytest.raises(DamagedArtifact, match=said):
        check_adapter(adapter)
