"""A base that is shared out over the processes that train together: FSDP2, through the Trainer and accelerate's plugin.

Each process keeps its part of every layer's weights, adapter, gradients and optimizer states, and gathers a layer when it
computes. A 4-bit base can be shared out where bitsandbytes stores its weights in a floating type (`load_model`); the
scales of each layer stay whole in every process. Two processes on a CPU make the steps of one, on 16-bit and on NF4
bases; on GPUs it has not run.
"""

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from regraft.errors import RegraftError
from regraft.model.adapter import RECOMPUTED
from regraft.train.params import TrainParams

if TYPE_CHECKING:
    import torch


def fsdp_arguments(params: TrainParams) -> dict[str, Any]:
    """Return what `TrainingArguments` needs for `sharding: full`; recomputed activations are FSDP's own then."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "activation_checkpointing": params.gradient_checkpointing,
            "cpu_ram_efficient_loading": False,  # would move 4-bit weights to a device on which they lose their scales
        },
    }


def enable_sharding(accelerator: Any, settings: dict[str, Any]) -> None:
    """Make accelerate share out on a CPU, too: it drops its plugin there, and would train whole copies without a word."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)


def follow_shards(model: Any, parameters: "MutableMapping[str, torch.nn.Parameter]") -> None:
    """Put the shards that took their places into a dict of trained parameters, and scales beside the weights."""
    from torch.distributed.fsdp import FSDPModule

    from regraft.model.adapter import adapter_parameters

    names = set(model._no_split_modules or ())
    layers = sum(type(module).__name__.removeprefix("FSDP") in names for module in model.modules())
    if not layers or sum(isinstance(module, FSDPModule) for module in model.modules()) < layers:
        raise RegraftError(
            "the base's layers were not shared out one by one, so a step would gather all of it",
            fix="set train.sharding to none; this architecture does not name its layers",
        )
    found = {key.replace(RECOMPUTED, ""): parameter for key, parameter in adapter_parameters(model).items()}
    assert found.keys() == parameters.keys()
    parameters.update(found)
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and hasattr(module, "weight"):
            state.to(module.weight.device)


def whole(tensor: Any) -> Any:
    """Return all of a tensor of which this process may hold a part; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(parameters: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Return all of every parameter, on the CPU; every process must ask for it."""
    return {key: whole(parameter.detach()).cpu() for key, parameter in parameters.items()}


def part_like(tensor: "torch.Tensor", parameter: Any) -> Any:
    """Return this process's part of a whole tensor, shared out as a parameter is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(parameter, "device_mesh"):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_states(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors, whatever the number of processes; every process must ask."""
    content = optimizer.state_dict()
    states = {
        index: {key: whole(value).cpu() if hasattr(value, "cpu") else value for key, value in state.items()}
        for index, state in content["state"].items()
    }
    return {**content, "state": states}


def load_states(optimizer: Any, content: dict[str, Any]) -> None:
    """Share out a state of `whole_states` as the optimizer's parameters are."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {
            key: part_like(value, held[index]) if getattr(value, "shape", None) == held[index].shape else value
            for key, value in state.items()
        }
        for index, state in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": states})
