"""Where A and B begin: what PEFT's own initialisations don't do on a CPU, for Conv1D, or so that it can be undone.

PiSSA and OLoRA take their start out of the base; the result is then saved as a plain adapter for the untouched base:
W₀ - s·B₀A₀ + s·BA = W₀ + s·[B, -B₀][A; A₀], of twice the rank.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import MissingInput, ParamsError
from regraft.model.adapter import CONFIG, WEIGHTS, adapter_bytes, adapter_config, lora_layers
from regraft.model.check import PREFIX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Start:
    """What was taken out of the base: A₀ and B₀, by the keys of the adapter's file; empty for most kinds of start."""

    tensors: "Mapping[str, torch.Tensor]"

    def save(self, model: Any, folder: Path, *, base_name: str, dtype: str) -> None:
        """Write the adapter that does to the untouched base what the trained one does to the one without its start."""
        import torch

        from regraft.artifacts import pretty_json, read_json
        from regraft.model.adapter import adapter_parameters

        joined = {}
        for key, parameter in adapter_parameters(model).items():
            first = self.tensors.get(key)
            if first is None:
                joined[key] = parameter.detach().cpu()
            elif ".lora_A." in key:
                joined[key] = torch.cat([parameter.detach().cpu(), first], dim=0)
            else:
                joined[key] = torch.cat([parameter.detach().cpu(), -first], dim=1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(adapter_config(model, base_name))
        config = read_json(folder / CONFIG)
        factor = math.sqrt(2) if config["use_rslora"] else 2  # so that the scale stays what it was
        config["r"] *= 2
        config["lora_alpha"] *= factor
        config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
        config["alpha_pattern"] = {name: factor * alpha for name, alpha in config["alpha_pattern"].items()}
        (folder / CONFIG).write_bytes(pretty_json(config))
        (folder / WEIGHTS).write_bytes(adapter_bytes(joined, dtype))


def take_start(model: Any, kind: str) -> Start:
    """Begin A and B at the base's principal part, and take that out of the base, so that the model's output stays.

    Args:
        model: a `PeftModel` on a base that is not quantised.
        kind: `pissa` (singular vectors and values, arXiv:2404.02948) or `olora` (QR, arXiv:2406.01775).
    """
    import torch

    tensors = {}
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            weight, scale, rank = _matrix(layer).float(), layer.scaling["default"], layer.r["default"]
            if kind == "pissa":
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                root = (s[:rank] / scale).sqrt()
                a, b = root[:, None] * vh[:rank], u[:, :rank] * root
            else:
                q, r = torch.linalg.qr(weight)
                a, b = r[:rank], q[:, :rank]
            if a.shape[0] < rank:
                raise ParamsError(
                    f"train.rank: found {rank} for {name}, expected at most {a.shape[0]} with `init: {kind}`"
                )
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous().cpu()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous().cpu()
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    start = Start(tensors)
    remove_start(model, start)
    return start


def remove_start(model: Any, start: Start) -> None:
    """Take a start out of the base's weights, in fp32, rounded once."""
    import torch

    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            a, b = (start.tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
            base = layer.get_base_layer()
            change = layer.scaling["default"] * (b @ a).to(base.weight.device)
            rest = _matrix(layer).float() - change
            base.weight = torch.nn.Parameter(
                (rest.T if layer.fan_in_fan_out else rest).to(base.weight.dtype).contiguous(), requires_grad=False
            )


def repair_quantization(model: Any, base: Path) -> None:
    """Begin A and B at the best low-rank part of what 4-bit quantisation lost (one step of LoftQ, arXiv:2310.08659).

    The base stays as it is, so the adapter is a plain one. PEFT's own `replace_lora_weights_loftq` needs CUDA and
    leaves alpha / rank out.

    Raises:
        MissingInput: a layer's original weight is not in the base's files under its own name.
    """
    import bitsandbytes.functional
    import torch

    originals = _weights_of(base)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            held = layer.get_base_layer().weight
            if held.is_floating_point() and not hasattr(held, "quant_state"):
                continue  # left unquantised: nothing was lost
            lost = originals(name).to(held.device, torch.float32)
            lost -= bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state).float()
            u, s, vh = torch.linalg.svd(lost, full_matrices=False)
            rank = min(layer.r["default"], len(s))
            root = (s[:rank] / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight[:rank] = root[:, None] * vh[:rank]
            layer.lora_B["default"].weight[:, :rank] = u[:, :rank] * root


def follow_inputs(model: Any, batches: "Iterable[dict[str, torch.Tensor]]") -> None:
    """Begin A at the directions in which each layer's inputs are largest (EVA, arXiv:2410.07170), B at zero.

    An incremental SVD over the first batches of the training set; ranks are not moved between layers. PEFT's own goes
    on until directions stop turning, which a small training set may never do.

    Args:
        model: a `PeftModel` whose B is zero.
        batches: as `regraft.train.data.collate` makes them; each is passed through the model once.
    """
    import torch

    from regraft.train.loss import positions

    layers = lora_layers(model)
    kept: dict[str, torch.Tensor] = {}
    seen: list[Any] = [None, None, {}]  # the last input, its rows, and what was made of it by rank

    def note(name: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        if seen[0] is not inputs[0]:  # query, key and value layers get the same tensor: one SVD for the three
            seen[:] = [inputs[0], inputs[0].detach().flatten(0, -2).float(), {}]
        rank = layer.r["default"]
        if rank not in seen[2]:
            rows = seen[1] if name not in kept else torch.cat([kept[name], seen[1]])
            _, s, v = torch.svd_lowrank(rows, q=min(2 * rank, *rows.shape), niter=2)
            seen[2][rank] = s[:, None] * v.T
        kept[name] = seen[2][rank]

    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: note(name, layer, inputs))
        for name, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in islice(batches, _EVA_BATCHES):
                model(input_ids=batch["input_ids"], use_cache=False, **positions(model, batch))
            for name, layer in layers.items():
                a = layer.lora_A["default"].weight
                directions = torch.nn.functional.normalize(kept[name][: a.shape[0]])
                a[: len(directions)] = directions
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


_EVA_BATCHES = 16
"""Batches whose inputs give EVA's directions."""


def _matrix(layer: Any) -> "torch.Tensor":
    """A layer's weight as (out, in)."""
    weight: torch.Tensor = layer.get_base_layer().weight.data
    return weight.T if layer.fan_in_fan_out else weight


def _weights_of(base: Path) -> Any:
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)

    def read(module: str) -> "torch.Tensor":
        for key in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if key in where:
                with safe_open(where[key], "pt") as opened:
                    tensor: torch.Tensor = opened.get_tensor(key)
                    return tensor
        raise MissingInput(
            f"{base} holds no tensor {module}.weight, which `init: loftq` compares with", fix="set train.init: default"
        )

    return read
