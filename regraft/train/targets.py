"""Which layers get an adapter: the groups, lists and expressions of `target_modules`, found by walking the base.

PEFT is given the exact paths (or last names that mean the same), so what it adapts is what the report lists.
"""

import difflib
import re
from typing import Any

from regraft.errors import ParamsError, RegraftError
from regraft.model.adapter import linear_modules, matches
from regraft.train.params import PRESETS

_ATTENTION, _MLP = re.compile(r"attn|attention"), re.compile(r"mlp|feed_forward|ffn|experts|moe")
_QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "q", "v")
"""Last names of query and value layers; the fused ones carry the key as well."""


def expected_modules(model: Any, targets: str | list[str]) -> list[str]:
    """Name every layer that is to carry an adapter, by walking the base model.

    Raises:
        ParamsError: a target names no linear layer; the message lists those that there are.
    """
    layers = list(linear_modules(model))
    if isinstance(targets, list):
        unknown = [target for target in targets if not any(matches(name, [target]) for name in layers)]
        if unknown:
            raise _nothing(", ".join(unknown), layers, unknown[0])
        return sorted(name for name in layers if matches(name, targets))
    output = model.get_output_embeddings()
    inner = [name for name in layers if model.get_submodule(name) is not output]
    if targets in PRESETS:
        found = [name for name in inner if in_group(name, targets)]
    else:
        found = [name for name in layers if re.fullmatch(targets, name)]
    if not found:
        raise _nothing(targets, layers, targets)
    return sorted(found)


def peft_targets(model: Any, expected: list[str]) -> list[str]:
    """Return what `LoraConfig.target_modules` must be: last names where they mean exactly these layers, else paths."""
    last_names = sorted({name.rpartition(".")[2] for name in expected})
    selected = sorted(name for name in linear_modules(model) if matches(name, last_names))
    return last_names if selected == expected else expected


def check_adapted(expected: list[str], adapted: list[str], model: Any) -> None:
    """Refuse a model in which a layer that was asked for carries no adapter, or another one does.

    Raises:
        RegraftError: with the layers, and the candidates that PEFT could have adapted.
    """
    missing, foreign = sorted({*expected} - {*adapted}), sorted({*adapted} - {*expected})
    if missing or foreign:
        raise RegraftError(
            f"PEFT adapted {len(adapted)} layers and {len(expected)} were expected; without an adapter: "
            f"{_some(missing)}; with one that nobody asked for: {_some(foreign)}; "
            f"this base's linear layers: {_some(sorted({n.rpartition('.')[2] for n in linear_modules(model)}), 20)}",
            fix="give train.target_modules as a list of layers that it has",
        )


def bare_weights(model: Any) -> list[str]:
    """Name the base's matrices that are in no linear layer and no embedding, such as fused experts (3-D) and routers.

    bitsandbytes leaves them unquantised (#1849) and `target_modules` gives them no adapter.
    """
    from torch import nn

    covered = {f"{name}.weight" for name in linear_modules(model)}
    covered |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and name not in covered
    )


def unquantized_layers(model: Any) -> list[str]:
    """Name the linear layers whose weights are held as floats."""
    return sorted(name for name in linear_modules(model) if model.get_submodule(name).weight.is_floating_point())


def in_group(name: str, group: str) -> bool:
    """Say whether a linear layer other than the output's belongs to one of `PRESETS`."""
    parents, _, last = name.rpartition(".")
    if group == "all-linear":
        return True
    if group == "mlp":
        return bool(_MLP.search(parents)) and not _ATTENTION.search(parents)
    return bool(_ATTENTION.search(parents)) and (group == "attention" or last in _QUERY_VALUE)


def _nothing(target: str, layers: list[str], close_to: str) -> ParamsError:
    known = sorted({name.rpartition(".")[2] for name in layers})
    close = difflib.get_close_matches(close_to, [*known, *PRESETS], n=1, cutoff=0.6)
    hint = f"did you mean `{close[0]}`?" if close else f"groups: {', '.join(PRESETS)}"
    return ParamsError(
        f"train.target_modules: {target} names no linear layer; this base has {', '.join(known)}; {hint}",
        fix="edit params.yaml",
    )


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
