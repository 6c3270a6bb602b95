"""LoRA adapters as files: written with equal bytes for equal content, and checked before anything loads them.

PEFT falls back to pickled files, imports modules that a configuration names, and warns where keys are missing or drop
out; so an adapter is read here as bytes first, and PEFT only gets what passed.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_file, digest_json, pretty_json, read_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.model.header import Tensor, read_header

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ALLOWED_FILES = {CONFIG, WEIGHTS, "manifest.json", "README.md"}
_PREFIX = "base_model.model."
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "megatron_core": "megatron.core",  # PEFT's default; imported only with a megatron_config, which is refused
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
}
_FREE = ("base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "peft_version", "r", "revision")


@dataclass(frozen=True)
class Adapter:
    """What a checked adapter is; nothing of it has been loaded."""

    folder: Path
    digest: str
    """Digest of {file: sha256} over configuration and weights."""
    rank: int
    alpha: float
    rslora: bool
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    targets: tuple[str, ...]
    modules: dict[str, tuple[int, int]]
    """(out, in) of every adapted layer, by its path in the base model."""
    tensors: dict[str, Tensor]
    zero_b: tuple[str, ...]
    """Layers whose B is zero everywhere."""

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank


def adapter_digest(folder: Path) -> str:
    """Return the digest of an adapter's configuration and weights; other files beside them don't count."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise MissingInput(f"{folder} lacks {' and '.join(missing)}")
    return digest_json({name: digest_file(folder / name) for name in (CONFIG, WEIGHTS)})


def check_adapter(folder: Path, *, modules: Mapping[str, tuple[int, int]] | None = None) -> Adapter:
    """Read an adapter as bytes and refuse whatever is not a plain, finite, working LoRA in safetensors.

    Args:
        folder: an adapter in PEFT's format.
        modules: (out, in) of every linear layer of the base that it is meant for, to find foreign and missing keys.

    Raises:
        MissingInput: the folder or one of its two files is not there.
        DamagedArtifact: pickles, links or other files; a configuration that names code, paths or anything but plain
            LoRA; an absurd header; tensors without their pair, of wrong rank, not finite, or B zero everywhere; layers
            that the base does not have, or that the configuration names and the file lacks.
    """
    _check_files(folder)
    config = _check_config(folder / CONFIG)
    targets = tuple(sorted(config["target_modules"]))
    tensors = read_header(folder / WEIGHTS)
    found = _pairs(folder / WEIGHTS, tensors, config["r"])
    if modules is not None:
        _check_modules(folder, found, targets, modules)
    zero_b = _check_values(folder / WEIGHTS, tensors)
    return Adapter(
        folder=folder,
        digest=adapter_digest(folder),
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        targets=targets,
        modules=found,
        tensors=tensors,
        zero_b=zero_b,
    )


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
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    if isinstance(model, PeftModel):
        peft_model.add_adapter(name, config)
    else:
        peft_model = attach(model, config, name=name)
    load_weights(peft_model, folder / WEIGHTS, name=name)
    peft_model.set_adapter(name)
    peft_model.requires_grad_(False)
    peft_model.eval()
    return peft_model


def attach(model: "nn.Module", config: Any, *, name: str = "default") -> "PeftModel":
    """Put a fresh adapter on a base model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config, adapter_name=name)


def load_weights(model: "PeftModel", file: Path, *, name: str = "default") -> None:
    """Copy the tensors of a file into a model's adapter; the keys of both must be the same."""
    import torch
    from safetensors.torch import load_file

    loaded = load_file(file)
    wanted = adapter_parameters(model, name)
    if loaded.keys() != wanted.keys():
        missing, foreign = sorted(wanted.keys() - loaded.keys()), sorted(loaded.keys() - wanted.keys())
        raise DamagedArtifact(f"{file} does not fit the model: missing {_some(missing)}; foreign {_some(foreign)}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if parameter.shape != loaded[key].shape:
                raise DamagedArtifact(f"{file}: {key} is {tuple(loaded[key].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(loaded[key])


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
    (folder / WEIGHTS).write_bytes(adapter_bytes(model, dtype))
    return adapter_digest(folder)


def adapter_config(model: "PeftModel", base_name: str) -> bytes:
    """Return `adapter_config.json` with sorted keys and lists, ready for inference."""
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=base_name, inference_mode=True)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain["peft_type"] = "LORA"
    return pretty_json({key: plain[key] for key in sorted(plain)})


def adapter_bytes(model: "PeftModel", dtype: str = "fp32") -> bytes:
    """Return an adapter's tensors as the bytes of a safetensors file."""
    import torch
    from safetensors.torch import save

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tensors = {
        key: parameter.detach().to("cpu", kind).contiguous() for key, parameter in adapter_parameters(model).items()
    }
    return bytes(save(tensors, metadata={"format": "pt"}))


def adapter_parameters(model: "PeftModel", name: str = "default") -> dict[str, "nn.Parameter"]:
    """Return A and B of every adapted layer of a model, by the key that PEFT's file format gives them."""
    infix = f".{name}."
    return {
        key.replace(infix, "."): parameter
        for key, parameter in sorted(model.named_parameters())
        if ".lora_" in key and infix in key
    }


def linear_modules(model: "nn.Module") -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer of a base model (quantised or not, adapted or not), by its path.

    The output layer counts too; `expected_modules` leaves it out for `all-linear`.
    """
    from torch import nn

    found = {}
    for name, module in model.named_modules():
        if ".lora_" in name or not isinstance(module, nn.Linear):
            continue
        found[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
    return found


def matches(name: str, targets: Iterable[str]) -> bool:
    """Say whether PEFT's `target_modules` names a layer: the whole path, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise MissingInput(f"the adapter {folder} is missing")
    foreign = sorted(
        p.name for p in folder.iterdir() if p.name not in _ALLOWED_FILES or not p.is_file() or p.is_symlink()
    )
    if foreign:
        raise DamagedArtifact(
            f"{folder} holds {_some(foreign)}; an adapter is plain files: {CONFIG} and {WEIGHTS}",
            fix="never load it; take the adapter from where it was trained",
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise MissingInput(f"{folder} lacks {' and '.join(missing)}")


def _check_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > 1_000_000:
        raise DamagedArtifact(f"{path} has {path.stat().st_size} bytes, expected a few thousand")
    config = read_json(path)
    if not isinstance(config, dict):
        raise DamagedArtifact(f"{path} is not a JSON object")
    problems = [
        f"{key}: found {json.dumps(value)[:60]}, expected {json.dumps(_PLAIN.get(key))}"
        for key, value in config.items()
        if key not in (*_FREE, "target_modules", "use_rslora")
        and not (key in _PLAIN and value == _PLAIN[key])
        and value not in (None, False, [], {})
    ]
    problems += [f"{key}: missing" for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in config]
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 65536:
        problems.append(f"r: found {rank!r:.60}, expected a whole number from 1")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        problems.append(f"lora_alpha: found {alpha!r:.60}, expected a positive number")
    targets = config.get("target_modules")
    # A string would be a regular expression, run on every module's name.
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        problems.append(f"target_modules: found {targets!r:.60}, expected a list of names")
    name = config.get("base_model_name_or_path")
    if name is not None and (not isinstance(name, str) or name.startswith(("/", "~", "\\")) or ".." in name):
        problems.append(f"base_model_name_or_path: found {name!r:.60}, expected a model's name, not a path")
    if problems:
        raise DamagedArtifact(f"{path} asks for more than plain LoRA: " + "; ".join(problems))
    return config


def _pairs(path: Path, tensors: dict[str, Tensor], rank: int) -> dict[str, tuple[int, int]]:
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        module, _, half = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not name.startswith(_PREFIX) or half not in ("A.weight", "B.weight") or not module:
            problems.append(f"{name} is not an A or B of a layer")
        elif tensor.dtype not in ("F32", "F16", "BF16") or len(tensor.shape) != 2 or 0 in tensor.shape:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        else:
            halves.setdefault(module, {})[half[0]] = tensor
    modules = {}
    for module, pair in sorted(halves.items()):
        if len(pair) != 2:
            problems.append(f"{module} has no {'B' if 'A' in pair else 'A'}")
        elif (pair["A"].shape[0], pair["B"].shape[1]) != (rank, rank):
            problems.append(
                f"{module} has rank {pair['A'].shape[0]} and {pair['B'].shape[1]}, the configuration {rank}"
            )
        else:
            modules[module] = (pair["B"].shape[0], pair["A"].shape[1])
    if problems:
        raise DamagedArtifact(f"{path}: {_some(problems)}")
    return modules


def _check_modules(
    folder: Path, found: dict[str, tuple[int, int]], targets: tuple[str, ...], base: Mapping[str, tuple[int, int]]
) -> None:
    problems = [f"{name} is foreign to the base" for name in found if name not in base]
    problems += [
        f"{name} is {found[name]}, the base's {base[name]}"
        for name in found
        if base.get(name, found[name]) != found[name]
    ]
    problems += [f"{name} is not among target_modules" for name in found if not matches(name, targets)]
    problems += [f"{name} is missing" for name in base if matches(name, targets) and name not in found]
    problems += [f"{target} names no layer" for target in targets if not any(matches(name, [target]) for name in base)]
    if problems:
        raise DamagedArtifact(
            f"{folder} does not fit the base model: {_some(problems)}", fix="use the base model that it was trained on"
        )


def _check_values(path: Path, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Refuse values that are not finite and a B that is zero in every layer; return the layers where it is."""
    import numpy as np

    broken, zero, layers = [], [], 0
    for name, tensor in tensors.items():
        kind: np.dtype[Any] = np.dtype({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
        values = np.fromfile(path, kind, count=(tensor.end - tensor.start) // kind.itemsize, offset=tensor.start)
        bits = (values & 0x7FFF) if tensor.dtype == "BF16" else values
        finite = bool((bits < 0x7F80).all()) if tensor.dtype == "BF16" else bool(np.isfinite(values).all())
        if not finite:
            broken.append(name)
        if name.endswith(".lora_B.weight"):
            layers += 1
            if not bits.any():
                zero.append(name.removeprefix(_PREFIX).removesuffix(".lora_B.weight"))
    if broken:
        raise DamagedArtifact(f"{path} has values that are not finite in {_some(broken)}")
    if len(zero) == layers:
        raise DamagedArtifact(f"{path}: B is zero in all {layers} layers: this adapter changes nothing")
    return tuple(sorted(zero))


def _some(items: list[str]) -> str:
    shown = ", ".join(item[:120] for item in items[:5]) or "none"
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
