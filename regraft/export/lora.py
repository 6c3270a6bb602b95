"""What an adapter's folder says: which weights it changes, by which factors, and whether a merge knows how.

PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. Known are LoRA, rsLoRA, DoRA, patterns of rank and
alpha, biases (`bias`, `lora_bias`), modules saved whole, trained tokens, and factors of bare parameters (fused experts).
What the merge does not know is refused by its name, never passed over: a merge that silently leaves out half an adapter
looks like a good one.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.model.header import Tensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # as PEFT before 0.9 named it
}
_EMBEDDING = "lora_embedding"
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta\Z")
_NESTED = ".base_layer"
_USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "bias",
    "lora_bias", "target_parameters", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
_INERT = {  # they say how the adapter was made or found; its bytes carry the result
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "loftq_config", "runtime_config", "modules_to_save",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base before training begins
_KNOWN_NAMES = {
    "alora_invocation_tokens": "an activation that depends on the prompt (aLoRA)",
    "arrow_config": "a router over several adapters (Arrow)",
    "layer_replication": "replicated layers",
}
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


@dataclass(frozen=True)
class Pair:
    """The factors of one module or bare parameter: W becomes W + scaling * B @ A, seen as `out x in`.

    The strings are names in the adapter's file. An embedding's factors are stored for the transposed weight (tokens x
    width), as PEFT keeps them.
    """

    module: str
    depth: int
    """How often PEFT nested the module: each bare parameter of one module has a wrapper of its own."""
    a: str
    b: str
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    embedding: bool = False
    bias: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be merged."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    pairs: tuple[Pair, ...]
    copies: dict[str, str]
    """Weights that the adapter carries whole, instead of the base's: name in the model to name in the adapter."""
    tokens: dict[str, tuple[str, tuple[int, ...]]]
    """Rows of embeddings that it carries instead of the base's: module to (name in the adapter, rows)."""

    @property
    def weights(self) -> Path:
        """The file of the factors."""
        return self.folder / WEIGHTS

    @property
    def fan_in_fan_out(self) -> bool:
        """Linear layers are stored `in x out`."""
        return bool(self.config.get("fan_in_fan_out"))

    def is_bare(self, parameter: str) -> bool:
        """Say whether a parameter (`...experts.down_proj`) was adapted by itself, not as a module's weight."""
        targets = self.config.get("target_parameters") or []
        return any(parameter == each or parameter.endswith(f".{each}") for each in targets)

    def rank_and_scaling(self, key: str) -> tuple[int, float]:
        """Return rank and scale of a module, its patterns looked up as PEFT does (`get_pattern_key`).

        Raises:
            DamagedArtifact: a pattern or a value cannot be used.
        """
        values = {}
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            value = self.config.get(field, 8)
            for regex, special in (self.config.get(pattern) or {}).items():
                try:
                    if re.match(rf"(.*\.)?({regex})$", key):
                        value = special
                        break
                except re.error as error:
                    raise DamagedArtifact(
                        f"{self.folder / CONFIG}: {pattern} has {regex!r}, not a pattern: {error}"
                    ) from error
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
                raise DamagedArtifact(f"{self.folder / CONFIG}: {field} of {key} is {value!r}, expected above 0")
            values[field] = value
        rank, alpha = int(values["r"]), values["lora_alpha"]
        return rank, alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and header, and check that a merge can do all that it asks for. Nothing is loaded.

    Raises:
        MissingInput: a file is not there.
        DamagedArtifact: config and tensors do not make an adapter.
        ParamsError: it needs what the merge does not do; the message names everything that is in the way.
    """
    _check_files(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise DamagedArtifact(f"{folder / CONFIG} is not a mapping")
    obstacles, tensors = _obstacles(config), read_header(folder / WEIGHTS)
    parts: dict[tuple[str, int], dict[str, str]] = {}
    copies: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for name in tensors:
        bare = name.removeprefix(_PREFIX)
        suffix = next((each for each in _PARTS if bare.endswith(each)), None)
        if bare == name:
            obstacles.append(f"the tensor {name} (expected {_PREFIX}...)")
        elif suffix is not None:
            module = bare.removesuffix(suffix)
            plain = module.replace(_NESTED, "")
            depth = (len(module) - len(plain)) // len(_NESTED)
            parts.setdefault((plain, depth), {})[_PARTS[suffix]] = name
        elif (found := _TOKENS.match(bare)) is not None:
            tokens[found.group(1).replace(_NESTED, "")] = name
        elif ".lora_" in bare:
            obstacles.append(f"the tensor {name}")
        else:
            copies[bare.replace(_NESTED, "").replace(".original_module", "")] = name
    if obstacles:
        raise ParamsError(
            f"{folder} cannot be merged: it has " + ", ".join(sorted(set(obstacles))),
            fix="serve this adapter on its base, or train a kind of LoRA that can be merged",
        )
    pairs = tuple(_pair(folder, tensors, *key, found) for key, found in sorted(parts.items()))
    adapter = Adapter(folder, config, tensors, pairs, copies, _tokens(folder, config, tensors, tokens))
    if not pairs and not copies and not tokens:
        raise DamagedArtifact(f"{folder / WEIGHTS} has nothing to merge")
    _check_magnitudes(adapter)
    return adapter


def _check_files(folder: Path) -> None:
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled and not (folder / WEIGHTS).is_file():
        raise DamagedArtifact(
            f"{folder} holds its weights as {pickled[0]}, a pickle that can run code; expected {WEIGHTS}",
            fix="save the adapter as safetensors where it was trained",
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingInput(f"{folder} is not an adapter: it has no {name}", fix="give the folder of a PEFT adapter")
        if name == CONFIG and (folder / name).stat().st_size > 1_000_000:
            raise DamagedArtifact(f"{folder / name} has {(folder / name).stat().st_size} bytes, expected thousands")


def _obstacles(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r} (expected 'LORA')")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS and not _is_default(start):
        found.append(
            f"init_lora_weights {start!r} (it changes the base before training: save it with PEFT's "
            "path_initial_model_for_weight_conversion first)"
        )
    for name, value in config.items():
        if name in _USED or name in _INERT or _is_default(value):
            continue
        found.append(f"{_KNOWN_NAMES[name]} ({name})" if name in _KNOWN_NAMES else name)
    return found


def _is_default(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _pair(folder: Path, tensors: dict[str, Tensor], module: str, depth: int, found: dict[str, str]) -> Pair:
    missing = [factor for factor in ("a", "b") if factor not in found]
    if missing:
        raise DamagedArtifact(f"{folder / WEIGHTS}: {module} has no factor {' and no factor '.join(missing).upper()}")
    a, b = (tensors[found[factor]].shape for factor in ("a", "b"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise DamagedArtifact(f"{folder / WEIGHTS}: {module} has factors of shapes {list(a)} and {list(b)}")
    names = [found.get(part) for part in ("bias", "magnitude")]
    embedding = _EMBEDDING in found["a"].rpartition(".")[2]
    return Pair(module, depth, found["a"], found["b"], (a[0], a[1]), (b[0], b[1]), embedding, *names)


def _tokens(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], names: dict[str, str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Pair each set of trained rows with its tokens: the config has one list, or one for each module."""
    wanted = config.get("trainable_token_indices")
    found = {}
    for module, name in names.items():
        rows = wanted
        if isinstance(wanted, dict):
            rows = next((rows for key, rows in wanted.items() if module == key or module.endswith(f".{key}")), None)
        plain = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not plain or rows is None or len(set(rows)) != len(rows) or tensors[name].shape[:1] != (len(rows),):
            raise DamagedArtifact(
                f"{folder / CONFIG}: trainable_token_indices are {str(rows)[:60]} for the {list(tensors[name].shape)} "
                f"values of {module}"
            )
        found[module] = (name, tuple(rows))
    if wanted and not found:
        raise DamagedArtifact(f"{folder / WEIGHTS} has no trained tokens, {CONFIG} names some")
    return found


def _check_magnitudes(adapter: Adapter) -> None:
    """DoRA scales every module; a file that lacks a magnitude was cut off, one that has them without it was altered."""
    dora = bool(adapter.config.get("use_dora"))
    wrong = [pair.module for pair in adapter.pairs if (pair.magnitude is not None) != dora]
    if wrong:
        raise DamagedArtifact(
            f"{adapter.weights}: {len(wrong)} modules {'lack' if dora else 'have'} a DoRA magnitude, first {wrong[0]}; "
            f"{CONFIG} says use_dora {str(dora).lower()}"
        )
