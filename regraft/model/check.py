"""An adapter's files, read as bytes and refused where they are not a plain, finite, working LoRA in safetensors.

PEFT falls back to pickled files, imports modules that a configuration names, and warns where keys are missing or drop
out; so nothing is loaded that did not pass here.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.artifacts import digest_file, digest_json, read_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.model.header import Tensor, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files of a tokenizer with tokens that the base lacks, which lie beside an adapter that was trained with it."""
_ALLOWED_FILES = {CONFIG, WEIGHTS, "manifest.json", "README.md", *TOKENIZER}
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "init_lora_weights": True,  # the bytes carry where A and B began
    "megatron_core": "megatron.core",  # PEFT's default; imported only with a megatron_config, which is refused
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
}
_FREE = ("base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "peft_version", "r", "revision")
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying")
_CHECKED = ("target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", *_FLAGS)
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""A module's path. PEFT runs the keys of a pattern as regular expressions: no others are let through."""
_TOKENS = ".token_adapter.trainable_tokens_delta"
_MAGNITUDE = ".lora_magnitude_vector"


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
    dora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    """Other ranks, by layer."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Other alphas, by layer."""
    saved: tuple[str, ...] = ()
    """Modules that it replaces whole."""
    tokens: "tuple[int, ...] | dict[str, tuple[int, ...]]" = ()
    """Tokens whose embeddings it replaces: those of the input embedding, or those of each module that is named."""
    transposed: bool = False
    """Its layers are stored (in, out): transformers' Conv1D."""
    tied: bool = False
    """What it saves of an embedding is the output layer's, too."""

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by, where no pattern says otherwise."""
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
        DamagedArtifact: pickles, links or other files; a configuration that names code, paths or anything but LoRA,
            DoRA, rsLoRA, modules saved whole and trained tokens; an absurd header; tensors without their pair, of wrong
            rank, not finite, or B zero everywhere; layers that the base does not have, or that the configuration names
            and the file lacks.
    """
    _check_files(folder)
    config = _check_config(folder / CONFIG)
    targets = tuple(sorted(config["target_modules"]))
    tensors = read_header(folder / WEIGHTS)
    found = _layers(folder / WEIGHTS, tensors, config)
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
        dora=bool(config.get("use_dora")),
        ranks=dict(config.get("rank_pattern") or {}),
        alphas=dict(config.get("alpha_pattern") or {}),
        saved=tuple(config.get("modules_to_save") or ()),
        tokens=_tokens_of(config.get("trainable_token_indices") or ()),
        transposed=bool(config.get("fan_in_fan_out")),
        tied=bool(config.get("ensure_weight_tying")),
    )


def _tokens_of(value: Any) -> "tuple[int, ...] | dict[str, tuple[int, ...]]":
    return {key: tuple(ids) for key, ids in value.items()} if isinstance(value, dict) else tuple(value)


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
            f"{folder} holds {some(foreign)}; an adapter is plain files: {CONFIG} and {WEIGHTS}",
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
        if key not in (*_FREE, *_CHECKED)
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
    problems += _pattern_problems(config)
    name = config.get("base_model_name_or_path")
    if name is not None and (not isinstance(name, str) or name.startswith(("/", "~", "\\")) or ".." in name):
        problems.append(f"base_model_name_or_path: found {name!r:.60}, expected a model's name, not a path")
    if problems:
        raise DamagedArtifact(f"{path} asks for what is not plain LoRA: " + "; ".join(problems))
    return config


def _pattern_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    for key, kind, most in (("rank_pattern", int, 65536), ("alpha_pattern", (int, float), 1e6)):
        value = config.get(key) or {}
        good = isinstance(value, dict) and all(
            _PATH.fullmatch(k) and isinstance(v, kind) and not isinstance(v, bool) and 0 < v <= most
            for k, v in value.items()
        )
        if not good:
            problems.append(f"{key}: found {json.dumps(value)[:60]}, expected layers' paths and positive numbers")
    saved, tokens = config.get("modules_to_save") or [], config.get("trainable_token_indices") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and _PATH.fullmatch(name) for name in saved):
        problems.append(f"modules_to_save: found {json.dumps(saved)[:60]}, expected a list of modules' paths")
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    named = not isinstance(tokens, dict) or all(_PATH.fullmatch(key) for key in tokens)
    if not named or not all(
        isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids) for ids in lists
    ):
        problems.append(
            f"trainable_token_indices: found {json.dumps(tokens)[:60]}, expected a list of whole numbers, or one for each "
            "module's path"
        )
    problems += [
        f"{flag}: found {config[flag]!r:.60}, expected true or false"
        for flag in _FLAGS
        if config.get(flag) not in (None, True, False)
    ]
    return problems


def _layers(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every adapted layer, after each tensor was found to be one that the configuration asks for."""
    parts: dict[str, dict[str, Tensor]] = {}
    tokens = config.get("trainable_token_indices") or []
    problems = []
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIX)
        module, _, half = inner.rpartition(".lora_")
        if tensor.dtype not in ("F32", "F16", "BF16") or not tensor.shape or 0 in tensor.shape:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        elif inner == name:
            problems.append(f"{name} is not a tensor of an adapter")
        elif module and half in ("A.weight", "B.weight", "magnitude_vector"):
            parts.setdefault(module, {})[half.removesuffix(".weight").removesuffix("_vector")] = tensor
        elif tokens and inner.endswith(_TOKENS):
            rows = _rows_of(inner.removesuffix(_TOKENS), tokens)
            if tensor.shape[0] != rows:
                problems.append(f"{name} has {tensor.shape[0]} rows for {rows} tokens")
        elif not matches(inner.rpartition(".")[0], config.get("modules_to_save") or []):
            problems.append(f"{name} is not an A or B of a layer")
    if tokens and not any(name.endswith(_TOKENS) for name in tensors):
        problems.append("the embeddings of trainable_token_indices are missing")
    names = [name.removeprefix(PREFIX).rpartition(".")[0] for name in tensors]
    problems += [
        f"{module} of modules_to_save is missing"
        for module in config.get("modules_to_save") or []
        if not any(matches(name, [module]) for name in names)
    ]
    modules = {}
    for module, found in sorted(parts.items()):
        rank = _rank_of(module, config)
        wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
        if set(found) != wanted:
            lacking, more = sorted(wanted - set(found)), sorted(set(found) - wanted)
            problems.append(
                f"{module} has no {' and '.join(lacking)}" if lacking else f"{module} has {' and '.join(more)}"
            )
        elif any(len(found[half].shape) != 2 for half in "AB"):
            problems.append(f"{module} has an A or B that is no matrix")
        elif (found["A"].shape[0], found["B"].shape[1]) != (rank, rank):
            problems.append(
                f"{module} has rank {found['A'].shape[0]} and {found['B'].shape[1]}, the configuration {rank}"
            )
        elif "magnitude" in wanted and max(found["magnitude"].shape) != found["B"].shape[0]:
            problems.append(
                f"{module} has a magnitude of {list(found['magnitude'].shape)} for {found['B'].shape[0]} rows"
            )
        else:
            modules[module] = (found["B"].shape[0], found["A"].shape[1])
    if problems:
        raise DamagedArtifact(f"{path}: {some(problems)}")
    return modules


def _rows_of(module: str, tokens: Any) -> int:
    """How many tokens a module's trained rows are for."""
    if not isinstance(tokens, dict):
        return len(tokens)
    return next((len(ids) for key, ids in tokens.items() if matches(module, [key])), 0)


def _rank_of(module: str, config: dict[str, Any]) -> int:
    """A layer's rank; paths are looked up as PEFT does, the first that the layer's path ends with."""
    for key, rank in (config.get("rank_pattern") or {}).items():
        if matches(module, [key]):
            return int(rank)
    return int(config["r"])


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
            f"{folder} does not fit the base model: {some(problems)}", fix="use the base model that it was trained on"
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
                zero.append(name.removeprefix(PREFIX).removesuffix(".lora_B.weight"))
    if broken:
        raise DamagedArtifact(f"{path} has values that are not finite in {some(broken)}")
    if layers and len(zero) == layers:
        raise DamagedArtifact(f"{path}: B is zero in all {layers} layers: this adapter changes nothing")
    return tuple(sorted(zero))


def some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    shown = ", ".join(item[:120] for item in items[:5]) or "none"
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
