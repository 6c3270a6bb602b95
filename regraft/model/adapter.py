"""LoRA adapters on a model: put on, loaded after `regraft.model.check`, and written with equal bytes for equal content."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import pretty_json
from regraft.errors import DamagedArtifact, ParamsError
from regraft.model.check import CONFIG, PREFIX, WEIGHTS, Adapter, adapter_digest, check_adapter, matches, some

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

__all__ = [
    "CONFIG", "WEIGHTS", "Adapter", "adapter_bytes", "adapter_config", "adapter_digest", "adapter_parameters", "attach",
    "check_adapter", "linear_modules", "load_adapter", "load_parameters", "load_weights", "lora_layers", "matches",
    "save_adapter",
    "take_off",
]  # fmt: skip
RECOMPUTED = "_checkpoint_wrapped_module."
"""Stands in the paths of layers that FSDP recomputes in the backward pass."""


def load_adapter(model: "nn.Module", folder: Path, *, name: str = "default") -> "PeftModel":
    """Put a checked adapter on a base model, frozen and in evaluation mode.

    Args:
        model: a base model, or a `PeftModel` that gets one more adapter.
        folder: an adapter in PEFT's format.
        name: what the model calls it; it becomes the active one.

    Raises:
        DamagedArtifact: see `check_adapter`; or the model's adapter and the file's do not have the same keys.
    """
    from peft import LoraConfig, PeftModel

    peft_model: Any = model
    base = peft_model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = check_adapter(folder, modules=linear_modules(base))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        rank_pattern=adapter.ranks,
        alpha_pattern=adapter.alphas,
        modules_to_save=list(adapter.saved) or None,
        trainable_token_indices=_rows(adapter, base) or None,
        ensure_weight_tying=adapter.tied,
        fan_in_fan_out=adapter.transposed,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    if isinstance(model, PeftModel):
        peft_model.add_adapter(name, config)
    else:
        peft_model = attach(model, config, name=name)
    _give_room(peft_model, name, dora=adapter.dora)
    load_weights(peft_model, folder / WEIGHTS, name=name)
    peft_model.set_adapter(name)
    peft_model.requires_grad_(False)
    peft_model.eval()
    return peft_model


def _rows(adapter: Adapter, base: Any) -> Any:
    """Return an adapter's trained tokens as PEFT's configuration wants them.

    Raises:
        DamagedArtifact: the base has no rows for them.
    """
    tokens = adapter.tokens
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    highest = max((token for ids in lists for token in ids), default=-1)
    rows = base.get_input_embeddings().weight.shape[0] if highest >= 0 else 0
    if highest >= rows > 0:
        raise DamagedArtifact(
            f"{adapter.folder} has an embedding for the token {highest}, the base {rows} rows: it was trained with "
            "tokens that were added",
            fix="set model.new_tokens as it was trained with, and run `dvc repro model`",
        )
    return {key: list(ids) for key, ids in tokens.items()} if isinstance(tokens, dict) else list(tokens)


def _give_room(model: "PeftModel", name: str, *, dora: bool) -> None:
    """Put an adapter's A and B on the computing device where their layer is offloaded: PEFT leaves them without memory.

    Nothing else would say so: copying into a tensor of the meta device does nothing.
    """
    import torch

    from regraft.model.load import device

    offloaded = [key for key, parameter in model.named_parameters() if parameter.is_meta and f".{name}." in key]
    foreign = [key for key in offloaded if ".lora_A." not in key and ".lora_B." not in key]
    if foreign or (offloaded and dora):
        raise ParamsError(
            f"this adapter has more than A and B in {len(offloaded)} tensors of offloaded layers ({some(foreign or offloaded)})",
            fix="set evaluate.gpu_memory to null, or high enough for those layers",
        )
    for key in offloaded:
        module = model.get_submodule(key.rpartition(".")[0])
        module.weight = torch.nn.Parameter(torch.empty_like(module.weight, device=device()))


def take_off(model: "PeftModel") -> Any:
    """Return the plain base of a model, as it was before adapters were put on it.

    PEFT's `unload` leaves modules that an adapter saved whole in the base's place, and the next one would be judged on
    them.
    """
    from peft.utils.other import ModulesToSaveWrapper

    originals = {
        name.removeprefix(PREFIX): module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base: Any = model.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    return base


def attach(model: "nn.Module", config: Any, *, name: str = "default") -> "PeftModel":
    """Put a fresh adapter on a base model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config, adapter_name=name)


def load_weights(model: "PeftModel", file: Path, *, name: str = "default") -> None:
    """Copy the tensors of a file into a model's adapter; the keys of both must be the same."""
    load_parameters(adapter_parameters(model, name), file)


def load_parameters(wanted: "Mapping[str, nn.Parameter]", file: Path | bytes) -> None:
    """Copy the tensors of a safetensors file, or of its content, into parameters; both must have the same keys."""
    import torch
    from safetensors.torch import load, load_file

    loaded = load(file) if isinstance(file, bytes) else load_file(file)
    name = "the content" if isinstance(file, bytes) else str(file)
    if loaded.keys() != wanted.keys():
        missing, foreign = sorted(wanted.keys() - loaded.keys()), sorted(loaded.keys() - wanted.keys())
        raise DamagedArtifact(f"{name} does not fit the model: missing {some(missing)}; foreign {some(foreign)}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if parameter.shape != loaded[key].shape:
                raise DamagedArtifact(f"{name}: {key} is {tuple(loaded[key].shape)}, expected {tuple(parameter.shape)}")
            shared: Any = parameter
            value = loaded[key]
            if hasattr(shared, "device_mesh"):  # this process holds a part of it
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(shared.device), shared.device_mesh, shared.placements)
            parameter.copy_(value)


def save_adapter(model: "PeftModel", folder: Path, *, base_name: str, dtype: str = "fp32") -> str:
    """Write a model's adapter into a folder and return its digest; equal adapters give equal bytes.

    Args:
        model: with one LoRA adapter.
        folder: is made.
        base_name: what the configuration calls the base model; never a path of this machine.
        dtype: `fp32` or `bf16`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(adapter_config(model, base_name))
    (folder / WEIGHTS).write_bytes(adapter_bytes(adapter_parameters(model), dtype))
    return adapter_digest(folder)


def adapter_config(model: "PeftModel", base_name: str) -> bytes:
    """Return `adapter_config.json` with sorted keys and lists, ready for inference.

    Patterns are written out by layer, so that a reader needs no regular expressions, and the start of A and B is left
    out: what the file holds is their end.
    """
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base_name, inference_mode=True, init_lora_weights=True, eva_config=None)
    config.update(rank_pattern={}, alpha_pattern={})
    for name, layer in lora_layers(model).items():
        if layer.r["default"] != config["r"]:
            config["rank_pattern"][name] = layer.r["default"]
        if layer.lora_alpha["default"] != config["lora_alpha"]:
            config["alpha_pattern"][name] = layer.lora_alpha["default"]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain["peft_type"] = "LORA"
    return pretty_json({key: plain[key] for key in sorted(plain)})


def lora_layers(model: "PeftModel") -> dict[str, Any]:
    """Return PEFT's layers that carry an A and a B, by their path in the base."""
    return {
        name.removeprefix(PREFIX).replace(RECOMPUTED, ""): module
        for name, module in sorted(model.named_modules())
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def adapter_bytes(parameters: "Mapping[str, torch.Tensor]", dtype: str = "fp32") -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    import torch
    from safetensors.torch import save

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tensors = {key: parameter.detach().to("cpu", kind).contiguous() for key, parameter in parameters.items()}
    return bytes(save(tensors, metadata={"format": "pt"}))


def adapter_parameters(model: "PeftModel", name: str = "default") -> dict[str, "nn.Parameter"]:
    """Return all that an adapter trains, by the key that PEFT's file format gives it.

    That is A and B of every adapted layer, DoRA's magnitudes, modules saved whole, and trained tokens.
    """
    found = {}
    for key, parameter in sorted(model.named_parameters()):
        if ".lora_" in key and f".{name}." in key:
            plain = key.replace(f".{name}.", ".")
            found[plain.removesuffix(".weight") if ".lora_magnitude_vector." in key else plain] = parameter
        elif f".modules_to_save.{name}." in key:
            found[key.replace(f".modules_to_save.{name}.", ".")] = parameter
        elif key.endswith(f".trainable_tokens_delta.{name}"):
            found[key.removesuffix(f".{name}")] = parameter
    return found


def linear_modules(model: "nn.Module") -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer of a base model (quantised or not, adapted or not), by its path.

    The output layer counts too; `expected_modules` leaves it out for `all-linear`. GPT-2's Conv1D is a linear layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if ".lora_" in name or ".modules_to_save." in name or not isinstance(module, nn.Linear | Conv1D):
            continue
        path = name
        for wrapper in (".base_layer", ".token_adapter", ".original_module"):
            path = path.removesuffix(wrapper)
        shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        found[path] = shape
    return found
