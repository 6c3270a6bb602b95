"""The merge: W + s * B @ A, tensor by tensor and block by block, from safetensors to safetensors.

The sum is made in float32 and rounded once. Memory is bounded by a few blocks (`regraft.export.tensors.BLOCK`) and one
module's factors, whatever the model's size; nothing is mapped into memory. On a 16-bit base the tensors are
bit-identical to those of PEFT's `merge_and_unload`; where PEFT's merge is wrong (tied embeddings) they are not.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import pretty_json, read_json
from regraft.errors import DamagedArtifact, ParamsError
from regraft.export.lora import Adapter, Delta, read_adapter
from regraft.export.tensors import (
    FLOATS,
    INDEX,
    Planned,
    Reader,
    Writer,
    aligned,
    catalogue,
    shape_of_rows,
    torch_dtype,
)
from regraft.failpoints import failpoint
from regraft.model.header import Tensor

if TYPE_CHECKING:
    import torch

log = logging.getLogger("regraft")

Weights = Callable[[Reader, str], "Iterator[tuple[int, torch.Tensor]]"]
"""Where a base tensor's values come from: yields `(first row, rows x width)` in order, see `Reader.blocks`."""

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONV1D = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""Model types whose linear layers are stored `in x out` (transformers' Conv1D)."""
INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
"""Last names of input embeddings."""
OUTPUTS = ("lm_head", "embed_out", "output_projection")
"""Last names of output layers, which tied models share with the input embedding."""


@dataclass(frozen=True)
class Step:
    """One tensor of the result: read `source` of the base, add `delta`, write as `target`."""

    target: Planned
    file: str
    source: str
    delta: Delta | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge that was checked before anything is written."""

    base: Path
    adapter: Adapter
    steps: tuple[Step, ...]
    untied: bool
    """The result's output layer is its own, where the base shared one with its input embedding."""
    conv1d: bool
    """Linear layers are stored `in x out`."""


def plan_merge(base: Path, adapter: Path, dtype: str) -> Plan:
    """Match every factor with a tensor of the base, from headers alone.

    Args:
        base: folder with weights in safetensors (sharded or not) and `config.json`.
        adapter: folder of a PEFT LoRA adapter.
        dtype: `bf16`, `fp16`, `fp32`, or `own` for each tensor's type in the base.

    Raises:
        DamagedArtifact: a key matches nothing, shapes disagree, or a file is not what it should be.
        ParamsError: the base is quantised, or the adapter needs what the merge does not do.
    """
    lora, config, tensors = read_adapter(adapter), read_config(base), catalogue(base)
    if "quantization_config" in config:
        raise ParamsError(
            f"{base} holds quantised weights; a merge needs the 16-bit original", fix="set model.base to the original"
        )
    foreign = sorted({tensor.dtype for _, tensor in tensors.values()} - {*FLOATS, "I64", "I32", "BOOL", "U8"})
    if foreign:
        raise ParamsError(f"{base} holds tensors of type {', '.join(foreign)}, which the merge does not know")
    conv1d = config.get("model_type") in CONV1D
    tied = config.get("tie_word_embeddings", True) is not False
    targets, problems = _match(lora, tensors, tied=tied)
    steps = []
    for name, (file, tensor) in tensors.items():
        delta = targets.get(name)
        transposed = delta is not None and _transposed(delta, tensor.shape, conv1d or lora.fan_in_fan_out, problems)
        steps.append(Step(Planned(name, _dtype(tensor, dtype), tensor.shape), file, name, delta, transposed))
    if problems:
        shown = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise DamagedArtifact(f"the adapter {adapter} does not fit the base {base}: {shown}")
    added, untied = _untie(lora, steps, targets) if tied else ([], False)
    plan = Plan(base, lora, (*steps, *added), untied, conv1d)
    _check_copies(plan)
    return plan


def merge(plan: Plan, out: Path, *, weights: Weights = Reader.blocks) -> None:
    """Write the merged tensors into the empty folder `out`, in the base's own sharding, with an index if it had one.

    Raises:
        DamagedArtifact: a sum is not finite in the type that it is stored in, or a file changed under the merge.
    """
    files = sorted({step.file for step in plan.steps})
    space = _Workspace()
    with Reader(plan.adapter.weights) as factors:
        for file in files:
            steps = {step.target.name: step for step in plan.steps if step.file == file}
            with (
                Reader(plan.base / file) as reader,
                Writer(out / file, ordered := aligned([step.target for step in steps.values()])) as writer,
            ):
                for target in ordered:
                    for block in _merged(steps[target.name], reader, factors, weights, space):
                        writer.block(block)
            failpoint("export.merge")
            log.info("export: merged %s (%d tensors)", file, len(steps))
    if (plan.base / INDEX).is_file():
        index = {
            "metadata": {"total_size": sum(step.target.size for step in plan.steps)},
            "weight_map": {step.target.name: step.file for step in sorted(plan.steps, key=lambda s: s.target.name)},
        }
        (out / INDEX).write_bytes(pretty_json(index))


def read_config(base: Path) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        MissingInput: it is not there.
        DamagedArtifact: it is not a mapping.
    """
    config = read_json(base / "config.json")
    if not isinstance(config, dict):
        raise DamagedArtifact(f"{base / 'config.json'} is not a mapping")
    return config


def _merged(
    step: Step, reader: Reader, factors: Reader, weights: Weights, space: "_Workspace"
) -> "Iterator[torch.Tensor]":
    """Yield the blocks of one tensor of the result; each is valid until the next one is asked for."""
    import torch

    dtype = torch_dtype(step.target.dtype)
    a = b = None
    if step.delta is not None:
        a, b = factors.whole(step.delta.a).float(), factors.whole(step.delta.b).float()
    for first, block in weights(reader, step.source):
        if step.delta is None or a is None or b is None:
            if block.dtype == dtype:
                yield block
                continue
            total = block
        else:
            rows, width = block.shape
            total = space.take("sum", torch.float32, rows, width).copy_(block)
            shape = (width, rows) if step.transposed else (rows, width)
            delta = space.take("delta", torch.float32, *shape)
            last = first + rows
            if step.transposed:
                torch.mm(b, a[:, first:last], out=delta)
            else:
                torch.mm(b[first:last], a, out=delta)
            delta.mul_(step.delta.scaling)
            total.add_(delta.t() if step.transposed else delta)
        result = total if total.dtype == dtype else space.take("rounded", dtype, *block.shape).copy_(total)
        if not _finite(result) and _finite(block):
            raise DamagedArtifact(
                f"{step.target.name} is not finite in {step.target.dtype} from row {first} on",
                fix="look at the adapter's weights, or set export.dtype to bf16 or fp32",
            )
        yield result


class _Workspace:
    """Memory that is used for one block after the other: torch's allocator would keep a dozen of them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, dtype: "torch.dtype", rows: int, width: int) -> "torch.Tensor":
        """Return a contiguous matrix with arbitrary values; it shares its memory with the last one of this name."""
        import torch

        held = self._held.get((name, dtype))
        if held is None or held.numel() < rows * width:
            held = self._held[name, dtype] = torch.empty(rows * width, dtype=dtype)
        return held[: rows * width].view(rows, width)


def _finite(block: "torch.Tensor") -> bool:
    import torch

    if not block.numel():
        return True
    smallest, largest = torch.aminmax(block)  # a NaN comes out as both; no copies, unlike torch.isfinite
    return bool(torch.isfinite(smallest) and torch.isfinite(largest))


def _dtype(tensor: Tensor, wanted: str) -> str:
    return tensor.dtype if wanted == "own" or tensor.dtype not in FLOATS else DTYPES[wanted]


def _match(lora: Adapter, tensors: dict[str, tuple[str, Tensor]], *, tied: bool) -> tuple[dict[str, Delta], set[str]]:
    """Pair each delta with a tensor's name; an output layer that the base does not store stands under its own name."""
    targets: dict[str, Delta] = {}
    problems: set[str] = set()
    for delta in lora.deltas:
        wanted = f"{delta.module}.weight"
        names = [wanted] if wanted in tensors else _by_end(wanted, tensors)
        if not names and tied and delta.module.rpartition(".")[2] in OUTPUTS:
            names = [wanted]
        if len(names) != 1:
            found = f"matches {len(names)}: {', '.join(names[:3])}" if names else "matches no tensor"
            problems.add(f"{delta.module} {found}")
        elif names[0] in targets:
            problems.add(f"{delta.module} and {targets[names[0]].module} match the same tensor {names[0]}")
        else:
            targets[names[0]] = delta
    return targets, problems


def _by_end(wanted: str, tensors: dict[str, tuple[str, Tensor]]) -> list[str]:
    """Names that differ from `wanted` only by leading components (`transformer.h.0...` is stored as `h.0...`)."""
    return [name for name in tensors if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]


def _transposed(delta: Delta, shape: tuple[int, ...], in_by_out: bool, problems: set[str]) -> bool:
    """Say whether a weight is stored `in x out`; a square one is as the model type or the adapter's config says."""
    straight, turned = shape == delta.shape, shape == delta.shape[::-1]
    if delta.embedding:
        straight = False
    if not straight and not turned:
        problems.add(f"{delta.module} is {list(shape)} in the base and {list(delta.shape)} in the adapter")
    return turned and (in_by_out or delta.embedding or not straight)


def _untie(lora: Adapter, steps: list[Step], targets: dict[str, Delta]) -> tuple[list[Step], bool]:
    """Part a tied pair of which the adapter changes one end: return the output layer to add, if any, and whether to."""
    present = {step.source for step in steps}
    output = next((delta for name, delta in targets.items() if name not in present), None)
    ends = [step for step in steps if _last(step.source) in INPUTS and len(step.target.shape) == 2]
    outputs = [step for step in steps if _last(step.source) in OUTPUTS]
    if output is None and not any(step.delta is not None for step in (*ends, *outputs)):
        return [], False
    if outputs:
        return [], True
    if len(ends) != 1:
        raise DamagedArtifact(
            f"the base ties its output layer to one of {[s.source for s in ends]}: expected one tensor"
        )
    end = ends[0]
    if output is not None and output.shape != end.target.shape:
        raise DamagedArtifact(
            f"the adapter {lora.folder} does not fit: {output.module} is {list(output.shape)}, "
            f"the base's {end.source} {list(end.target.shape)}"
        )
    name = f"{output.module}.weight" if output else "lm_head.weight"
    return [Step(Planned(name, end.target.dtype, end.target.shape), end.file, end.source, output)], True


def _last(name: str) -> str:
    """The last name of the module that a weight belongs to."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _check_copies(plan: Plan) -> None:
    """Refuse weights that PEFT saved along with the factors unless they are the base's own (it saves embeddings so)."""
    import torch

    with ExitStack() as stack:
        saved = stack.enter_context(Reader(plan.adapter.weights))
        for module, name in plan.adapter.copies.items():
            step = next((s for s in plan.steps if s.delta is not None and s.delta.module == module), None)
            same = step is not None and step.target.shape == saved.tensors[name].shape
            if step is not None and same:
                rows, width = shape_of_rows(step.target.shape)
                base = stack.enter_context(Reader(plan.base / step.file))
                pairs = zip(base.blocks(step.source), saved.blocks(name), strict=True) if rows * width else []
                same = all(torch.equal(mine.to(copy.dtype), copy) for (_, mine), (_, copy) in pairs)
            if not same:
                raise ParamsError(
                    f"{plan.adapter.folder} cannot be merged: {name} differs from the base's weights (a resized or "
                    "retrained embedding)",
                    fix="serve this adapter on its base",
                )
