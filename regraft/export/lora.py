"""What an adapter's folder says: which modules it changes, by which factors, and whether a merge knows how.

PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. What the merge does not know is refused by its
name, never passed over: a merge that silently leaves out half an adapter looks like a good one.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, ParamsError
from regraft.model.header import Tensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
_COPY = ".base_layer.weight"
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
_INERT = {  # they say how the adapter was made or found; its bytes carry the result
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "loftq_config", "runtime_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base before training begins
_KNOWN_NAMES = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in B",
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters on bare parameters (fused experts)",
    "layer_replication": "replicated layers",
    "ensure_weight_tying": "tied adapters",
}


@dataclass(frozen=True)
class Delta:
    """The change of one module: its weight, seen as `out x in`, becomes W + scaling * B @ A.

    `a` (rank x in) and `b` (out x rank) are names in the adapter's file. An embedding's factors are stored for the
    transposed weight (tokens x width), as PEFT keeps them.
    """

    module: str
    a: str
    b: str
    shape: tuple[int, int]
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be merged; `copies` are unchanged weights that PEFT saved along, by module."""

    folder: Path
    deltas: tuple[Delta, ...]
    copies: dict[str, str]
    fan_in_fan_out: bool

    @property
    def weights(self) -> Path:
        """The file of the factors."""
        return self.folder / WEIGHTS


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and header, and check that a merge can do all that it asks for.

    Raises:
        MissingInput: a file is not there.
        DamagedArtifact: config and tensors do not make an adapter.
        ParamsError: it needs what the merge does not do; the message names everything that is in the way.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise DamagedArtifact(f"{folder / CONFIG} is not a mapping")
    obstacles = _obstacles(config)
    factors: dict[tuple[str, bool], dict[str, tuple[str, Tensor]]] = {}
    copies: dict[str, str] = {}
    for name, tensor in read_header(folder / WEIGHTS).items():
        module = name.removeprefix(_PREFIX)
        suffix = next((each for each in _FACTORS if module.endswith(each)), None)
        if module == name:
            obstacles.append(f"the tensor {name} (expected {_PREFIX}...)")
        elif suffix is not None:
            factor, embedding = _FACTORS[suffix]
            factors.setdefault((module.removesuffix(suffix), embedding), {})[factor] = (name, tensor)
        elif module.endswith(_COPY):
            copies[module.removesuffix(_COPY)] = name
        else:
            obstacles.append(f"the tensor {name}")
    if obstacles:
        raise ParamsError(
            f"{folder} cannot be merged: it has " + ", ".join(sorted(set(obstacles))),
            fix="serve this adapter on its base, or train one with plain LoRA or rsLoRA",
        )
    deltas = tuple(_delta(folder, config, *key, found) for key, found in sorted(factors.items()))
    if not deltas:
        raise DamagedArtifact(f"{folder / WEIGHTS} has no LoRA factors: it would change nothing")
    return Adapter(folder, deltas, copies, bool(config.get("fan_in_fan_out")))


def _obstacles(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r} (expected 'LORA')")
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias: {config['bias']!r})")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS and not _is_default(start):
        found.append(f"init_lora_weights {start!r} (it changes the base before training)")
    for name, value in config.items():
        if name in _USED or name in _INERT or name in ("bias", "init_lora_weights") or _is_default(value):
            continue
        found.append(f"{_KNOWN_NAMES[name]} ({name})" if name in _KNOWN_NAMES else name)
    return found


def _is_default(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _delta(folder: Path, config: dict[str, Any], module: str, embedding: bool, found: dict[str, Any]) -> Delta:
    if set(found) != {"a", "b"}:
        raise DamagedArtifact(f"{folder / WEIGHTS}: {module} has only its factor {next(iter(found)).upper()}")
    (a, a_tensor), (b, b_tensor) = found["a"], found["b"]
    rank, scaling = _rank_and_scaling(folder, config, module)
    shapes = (a_tensor.shape, b_tensor.shape)
    if any(len(shape) != 2 for shape in shapes) or not shapes[0][0] == shapes[1][1] == rank:
        raise DamagedArtifact(
            f"{folder / WEIGHTS}: {module} has factors of shapes {list(shapes[0])} and {list(shapes[1])}, "
            f"the config says rank {rank}"
        )
    return Delta(module, a, b, (shapes[1][0], shapes[0][1]), scaling, embedding)


def _rank_and_scaling(folder: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """Return rank and scale of a module, its patterns looked up as PEFT does (`peft.utils.other.get_pattern_key`)."""
    values = {}
    for field, pattern, default in (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8)):
        value = config.get(field, default)
        for key, special in (config.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    value = special
                    break
            except re.error as error:
                raise DamagedArtifact(f"{folder / CONFIG}: {pattern} has {key!r}, not a pattern: {error}") from error
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
            raise DamagedArtifact(f"{folder / CONFIG}: {field} of {module} is {value!r}, expected a positive number")
        values[field] = value
    rank, alpha = int(values["r"]), values["lora_alpha"]
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
