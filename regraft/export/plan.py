"""What a merge will do, checked before anything is written: every factor matched with a tensor of the base.

Everything comes from headers and configs. A key that matches nothing is an error: PEFT only warns, and such a merge
looks like a good one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

from regraft.errors import DamagedArtifact, ParamsError
from regraft.export.base import INPUTS, OUTPUTS, BaseModelFiles, last_name
from regraft.export.lora import Adapter, Pair, read_adapter
from regraft.export.tensors import FLOATS, Planned
from regraft.model.header import Tensor

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_IN_BY_OUT_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "dbrx")
"""Model types whose fused experts are stored `experts x in x out`; asked only where both sides are equal."""
_EXPERTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}
"""Fused parameters that transformers makes of one tensor for each expert, and what those are called in the files."""
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # the order in which PEFT nests several of one module


@dataclass(frozen=True)
class Term:
    """One change of a tensor: s * B @ A, seen as `out x in`, or a part of it."""

    adapter: int
    """Which of the plan's adapters."""
    pair: Pair
    scaling: float
    experts: int = 1
    expert: int | None = None
    """The tensor belongs to this expert alone; None where it holds all of them."""
    part: tuple[int, int] | None = None
    """Rows of B that the tensor holds; None for all."""
    transposed: bool = False
    """The tensor is stored `in x out`."""
    rounded_by_peft: bool = False
    """PEFT rounds this change to the weight's type before it adds it (embeddings, bare parameters)."""


@dataclass(frozen=True)
class Step:
    """One tensor of the result: read `source` of the base, or `copy` of an adapter instead; add; write as `target`."""

    target: Planned
    file: str
    source: str
    terms: tuple[Term, ...] = ()
    biases: tuple[tuple[int, str, float], ...] = ()
    """Vectors to add: adapter, name there, factor."""
    copy: tuple[int, str] | None = None
    """Adapter and name there."""
    rows: tuple[int, str, tuple[int, ...]] | None = None
    """Rows to replace at last: adapter, name there, which; those beyond the base's are new."""

    @property
    def changed(self) -> bool:
        """The adapter has something to say about this tensor."""
        return bool(self.terms or self.biases or self.copy or self.rows)


@dataclass(frozen=True)
class Plan:
    """A merge that was checked before anything is written."""

    base: Path
    adapters: tuple[Adapter, ...]
    steps: tuple[Step, ...]
    untied: bool
    """The result's output layer is its own, where the base shared one with its input embedding."""
    conv1d: bool
    """Linear layers are stored `in x out`."""
    vocabulary: int | None = None
    """Rows of the embedding, where an adapter brought tokens along; None where it stayed as it was."""
    rounding: str = "nearest"

    @property
    def size(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(step.target.size for step in self.steps)


@dataclass
class _Draft:
    """What was matched so far, by name of the tensor in the result."""

    terms: dict[str, list[Term]] = field(default_factory=dict)
    biases: dict[str, list[tuple[int, str, float]]] = field(default_factory=dict)
    copies: dict[str, tuple[int, str]] = field(default_factory=dict)
    rows: dict[str, tuple[int, str, tuple[int, ...]]] = field(default_factory=dict)
    problems: set[str] = field(default_factory=set)


def plan_merge(
    base: Path, adapter: Path, dtype: str, *, more: Sequence[tuple[Path, float]] = (), weight: float = 1.0
) -> Plan:
    """Match every factor with a tensor of the base, from headers alone.

    Args:
        base: folder with weights in safetensors (sharded or not) and `config.json`.
        adapter: folder of a PEFT LoRA adapter.
        dtype: `bf16`, `fp16`, `fp32`, or `own` for each tensor's type in the base.
        more: further adapters, each with its weight; their changes are added up.
        weight: factor of the first adapter's change.

    Raises:
        DamagedArtifact: a key matches nothing, shapes disagree, or a file is not what it should be.
        ParamsError: the base is quantised, or an adapter needs what the merge does not do.
    """
    model, adapters = (
        BaseModelFiles(base),
        tuple(read_adapter(folder) for folder in (adapter, *(each for each, _ in more))),
    )
    _check_base(base, model)
    weights = (weight, *(each for _, each in more))
    _check_weights(adapters, weights)
    draft = _Draft()
    for number, (lora, factor) in enumerate(zip(adapters, weights, strict=True)):
        _match(model, lora, number, factor, draft)
    added, untied = _untie(adapters, model, draft) if model.tied else ([], False)
    steps = []
    for name, (file, tensor) in model.tensors.items():
        steps.append(_step(name, file, name, tensor, dtype, draft))
    for name in added:
        end = next(other for other in model.tensors if last_name(other) in INPUTS)
        file, tensor = model.tensors[end]
        steps.append(_step(name, file, end, tensor, dtype, draft))
    steps = [_resized(step, adapters, draft.problems) for step in steps]
    if draft.problems:
        shown = sorted(draft.problems)
        text = "; ".join(shown[:10]) + (f"; and {len(shown) - 10} more" if len(shown) > 10 else "")
        raise DamagedArtifact(f"the adapter {adapter} does not fit the base {base}: {text}")
    ends = [step for step in steps if last_name(step.target.name) in (*INPUTS, *OUTPUTS)]
    grown = {step.target.shape[0] for step in ends if step.copy or step.rows}
    before = {tensor.shape[0] for name, (_, tensor) in model.tensors.items() if last_name(name) in INPUTS}
    return Plan(base, adapters, tuple(steps), untied, model.conv1d, next(iter(grown - before), None))


def _check_base(base: Path, model: BaseModelFiles) -> None:
    if "quantization_config" in model.config:
        raise ParamsError(
            f"{base} holds quantised weights; a merge needs the 16-bit original", fix="give the folder of the original"
        )
    foreign = sorted({tensor.dtype for _, tensor in model.tensors.values()} - {*FLOATS, "I64", "I32", "BOOL", "U8"})
    if foreign:
        raise ParamsError(f"{base} holds tensors of type {', '.join(foreign)}, which the merge does not know")


def _check_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not all(abs(weight) < 1e6 and weight for weight in weights):
        raise ParamsError(f"weights of adapters are {list(weights)}, expected finite numbers other than 0")
    whole = [each for each in adapters if each.copies or each.tokens or each.config.get("use_dora")]
    if whole and (len(adapters) > 1 or weights[0] != 1):
        raise ParamsError(
            f"{whole[0].folder} replaces weights or scales them (DoRA, modules saved whole, trained tokens): it cannot "
            "be weighted or added to others",
            fix="merge it alone, with weight 1",
        )


def _match(model: BaseModelFiles, lora: Adapter, number: int, weight: float, draft: _Draft) -> None:
    bare: dict[str, list[Pair]] = {}
    for pair in lora.pairs:
        names = [] if pair.depth else model.find(f"{pair.module}.weight")
        if not names and (pair.depth or _bare_parameters(model, lora, pair.module)):
            bare.setdefault(pair.module, []).append(pair)
        elif len(names) != 1:
            found = f"matches {len(names)}: {', '.join(names[:3])}" if names else "matches no tensor"
            draft.problems.add(f"{pair.module} {found}")
        else:
            _match_module(model, lora, number, weight, pair, names[0], draft)
    for module, pairs in bare.items():
        _match_bare(model, lora, number, weight, module, pairs, draft)
    for wanted, name in lora.copies.items():
        names = model.find(wanted)
        if len(names) != 1:
            draft.problems.add(f"{wanted} matches {len(names) or 'no'} tensor{'s' if names else ''}")
        elif names[0] in draft.copies:
            draft.problems.add(f"{wanted} is given twice")
        else:
            draft.copies[names[0]] = (number, name)
    for module, (name, rows) in lora.tokens.items():
        names = model.find(f"{module}.weight")
        shape = model.shape(names[0]) if len(names) == 1 else None
        new = sorted(row for row in rows if shape is not None and row >= shape[0])
        if shape is None or lora.tensors[name].shape != (len(rows), *shape[1:]):
            draft.problems.add(f"the trained tokens of {module} match no embedding of their size")
        elif new != list(range(shape[0], shape[0] + len(new))):
            draft.problems.add(f"the new tokens of {module} leave rows after {shape[0]} without values: {new[:5]}")
        elif names[0] in draft.terms or names[0] in draft.copies:
            draft.problems.add(f"{module} has trained tokens and another change")
        else:
            draft.rows[names[0]] = (number, name, rows)


def _match_module(
    model: BaseModelFiles, lora: Adapter, number: int, weight: float, pair: Pair, name: str, draft: _Draft
) -> None:
    rank, scaling = lora.rank_and_scaling(pair.module)
    by_itself = lora.is_bare(f"{pair.module}.weight")
    if by_itself:
        rank, scaling = lora.rank_and_scaling(f"{pair.module}.weight")
    if pair.a_shape[0] != rank:
        draft.problems.add(f"{pair.module} has factors of rank {pair.a_shape[0]}, the config says {rank}")
        return
    if any(term.adapter == number for term in draft.terms.get(name, ())):
        draft.problems.add(f"{pair.module} and another module match the same tensor {name}")
        return
    copied = lora.copies.get(f"{pair.module}.weight")
    shape = lora.tensors[copied].shape if copied else model.shape(name)
    if shape is None:  # the output layer of a tied model, stored as the embedding
        shape = next((t.shape for each, (_, t) in model.tensors.items() if last_name(each) in INPUTS), ())
    mine = (pair.b_shape[0], pair.a_shape[1])
    straight, turned = shape == mine and not pair.embedding, shape == mine[::-1]
    if not straight and not turned:
        draft.problems.add(f"{pair.module} is {list(shape)} in the base and {list(mine)} in the adapter")
        return
    in_by_out = pair.embedding or model.conv1d or lora.fan_in_fan_out or not straight
    rounded = (pair.embedding and pair.magnitude is None) or by_itself
    term = Term(number, pair, scaling * weight, transposed=turned and in_by_out, rounded_by_peft=rounded)
    draft.terms.setdefault(name, []).append(term)
    if pair.bias is None:
        return
    biases = model.find(f"{pair.module}.bias")
    if len(biases) != 1 or model.shape(biases[0]) != lora.tensors[pair.bias].shape:
        draft.problems.add(f"{pair.module} has a bias in B, the base's layer has none of its size")
    else:
        draft.biases.setdefault(biases[0], []).append((number, pair.bias, scaling * weight))


def _bare_parameters(model: BaseModelFiles, lora: Adapter, module: str) -> list[str]:
    """Names of a module's parameters that an adapter targets and the base has, in PEFT's order of nesting."""
    lasts = {each.rpartition(".")[2] for each in lora.config.get("target_parameters") or []}
    wanted = [last for last in (*_PARAMETERS, *sorted(lasts - {*_PARAMETERS})) if last in lasts]
    targeted = [last for last in wanted if lora.is_bare(f"{module}.{last}")]
    return [last for last in targeted if model.find(f"{module}.{last}") or _per_expert(model, module, last)]


def _match_bare(
    model: BaseModelFiles, lora: Adapter, number: int, weight: float, module: str, pairs: list[Pair], draft: _Draft
) -> None:
    """Match factors of bare parameters: their names say the module only, their shapes which parameter they belong to."""
    inner_first = sorted(pairs, key=lambda pair: -pair.depth)
    for chosen in permutations(_bare_parameters(model, lora, module), len(pairs)):
        found = [
            _bare_terms(model, lora, number, weight, pair, f"{module}.{last}")
            for pair, last in zip(inner_first, chosen, strict=True)
        ]
        if all(found):
            for name, term in (item for terms in found for item in terms):
                draft.terms.setdefault(name, []).append(term)
            return
    shapes = ", ".join(f"{list(pair.b_shape)} x {list(pair.a_shape)}" for pair in inner_first)
    draft.problems.add(f"{module} has no parameters that its factors ({shapes}) fit")


def _bare_terms(
    model: BaseModelFiles, lora: Adapter, number: int, weight: float, pair: Pair, parameter: str
) -> list[tuple[str, Term]]:
    """Return the tensors that one bare parameter is stored as, each with its change; none where it does not fit."""
    rank, scaling = lora.rank_and_scaling(parameter)
    term = Term(number, pair, scaling * weight, rounded_by_peft=True)
    (total, inputs), outputs = pair.a_shape, pair.b_shape[0]
    names = model.find(parameter)
    if len(names) == 1:
        shape = model.tensors[names[0]][1].shape
        experts = shape[0] if len(shape) == 3 else 1
        straight, turned = shape[-2:] == (outputs, inputs), shape[-2:] == (inputs, outputs)
        if total != rank * experts or not (straight or turned):
            return []
        transposed = not straight or (turned and model.model_type in _IN_BY_OUT_EXPERTS)
        return [(names[0], replace(term, experts=experts, transposed=transposed))]
    module, _, last = parameter.rpartition(".")
    stored = _per_expert(model, module, last)
    experts = len(stored)
    fits = experts and total == rank * experts and outputs % len(stored[0]) == 0
    size = outputs // len(stored[0]) if fits else 0
    if not fits or any(model.shape(name) != (size, inputs) for group in stored for name in group):
        return []
    return [
        (name, replace(term, experts=experts, expert=expert, part=(place * size, (place + 1) * size)))
        for expert, group in enumerate(stored)
        for place, name in enumerate(group)
    ]


def _per_expert(model: BaseModelFiles, module: str, last: str) -> list[list[str]]:
    """Return the tensors of each expert that transformers fuses into one parameter; nothing where it fuses none."""
    for parts in _EXPERTS.get(last, ()):
        groups: list[list[str]] = []
        while True:
            found = [model.find(f"{module}.{len(groups)}.{part}.weight") for part in parts]
            if not all(len(names) == 1 for names in found):
                break
            groups.append([names[0] for names in found])
        if groups:
            return groups
    return []


def _step(name: str, file: str, source: str, tensor: Tensor, dtype: str, draft: _Draft) -> Step:
    return Step(
        Planned(name, tensor.dtype if dtype == "own" or tensor.dtype not in FLOATS else DTYPES[dtype], tensor.shape),
        file,
        source,
        tuple(draft.terms.get(name, ())),
        tuple(draft.biases.get(name, ())),
        draft.copies.get(name),
        draft.rows.get(name),
    )


def _resized(step: Step, adapters: Sequence[Adapter], problems: set[str]) -> Step:
    """Give a tensor the shape of its copy, or the rows of its new tokens; it differs from the base's in nothing else."""
    if step.rows is not None and step.copy is None:
        count = max(step.target.shape[0], *(row + 1 for row in step.rows[2]))
        return replace(step, target=replace(step.target, shape=(count, *step.target.shape[1:])))
    if step.copy is None:
        return step
    number, name = step.copy
    shape = adapters[number].tensors[name].shape
    ends = last_name(step.target.name) in (*INPUTS, *OUTPUTS)
    if shape != step.target.shape and not (ends and shape[1:] == step.target.shape[1:]):
        problems.add(f"{step.target.name} is {list(step.target.shape)} in the base and {list(shape)} in the adapter")
    return replace(step, target=replace(step.target, shape=shape))


def _untie(adapters: Sequence[Adapter], model: BaseModelFiles, draft: _Draft) -> tuple[list[str], bool]:
    """Part a tied pair where the adapter changes its ends differently: return output layers to add, and whether to."""
    touched = {*draft.terms, *draft.copies}
    outputs = sorted({name for name in (*model.tensors, *touched) if last_name(name) in OUTPUTS})
    ends = [name for name, (_, t) in model.tensors.items() if last_name(name) in INPUTS and len(t.shape) == 2]
    changed = [name for name in (*ends, *outputs) if name in touched]
    if not changed:
        return [], False
    if len(ends) != 1 or len(outputs) > 1:
        raise DamagedArtifact(f"the base ties its output layer {outputs} to one of {ends}: expected one of each")
    output, end = (outputs or ["lm_head.weight"])[0], ends[0]
    if any(name in draft.rows for name in (end, output)):
        raise ParamsError("trained tokens beside another change of tied embeddings cannot be merged")
    both = draft.copies.get(end), draft.copies.get(output)
    if both[0] and both[1] and not {end, output} & {*draft.terms} and _same(adapters, both[0], both[1]):
        draft.copies.pop(output)
        return [], False
    return ([] if output in model.tensors else [output]), True


def _same(adapters: Sequence[Adapter], one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Say whether two tensors of the adapters hold the same bytes, in blocks of fixed size."""
    places = [(adapters[number].weights, adapters[number].tensors[name]) for number, name in (one, other)]
    (path, first), (second_path, second) = places
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with path.open("rb") as mine, second_path.open("rb") as theirs:
        mine.seek(first.start)
        theirs.seek(second.start)
        left = first.end - first.start
        while left:
            count = min(left, 2**20)
            if mine.read(count) != theirs.read(count):
                return False
            left -= count
    return True
