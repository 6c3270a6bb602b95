"""Norms and singular values of what an adapter adds to each layer, through its factors.

ΔW = s·B·A has at most the adapter's rank r. With B = Q₁R₁ and Aᵀ = Q₂R₂ its singular values are those of the r x r
matrix s·R₁R₂ᵀ, so ΔW, which is as large as the layer, is never formed. All in float64.
"""

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from regraft.errors import DamagedArtifact
from regraft.export.lora import Adapter, Pair, read_adapter
from regraft.export.tensors import Reader, catalogue
from regraft.report import Report

if TYPE_CHECKING:
    import torch

ENERGY = 0.95
"""Share of ‖ΔW‖² that a smaller rank has to keep."""
DEAD = 1e-3
"""A layer whose change is smaller than this, relative to the median layer's, learnt nothing."""


class Layer(BaseModel):
    """One adapted layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    shape: tuple[int, int]
    """(out, in) of the layer."""
    rank: int
    scaling: float
    norm: float
    """Frobenius norm of ΔW."""
    relative: float | None
    """‖ΔW‖ / ‖W‖; null without a base model."""
    singular_values: list[float]
    """Of ΔW, largest first; as many as the rank."""
    effective_rank: float
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 for a layer that changed nothing."""
    energy: list[float]
    """Share of ‖ΔW‖² in the first k singular values, k from 1: 1 - energy[k-1] is the squared relative error of the
    best rank-k approximation (Eckart and Young 1936)."""
    needed: int
    """Smallest rank that keeps `ENERGY` of ‖ΔW‖²."""
    dead: bool


class Inspection(Report):
    """What an adapter learnt."""

    adapter: str
    """Name of its folder."""
    rank: int
    """Largest rank of its layers."""
    layers: list[Layer]
    skipped: list[str]
    """What it carries besides factors of matrices, and what was therefore not looked at."""
    dead: list[str]
    """Layers that learnt nothing."""
    suggested_rank: int | None
    """For the next training; null where every layer is dead."""
    why: str
    """The suggestion in words."""


def inspect(folder: Path, base: Path | None = None) -> Inspection:
    """Measure every layer of a LoRA adapter.

    Args:
        folder: an adapter in PEFT's format; a pickled or foreign one is refused before anything is loaded.
        base: folder of the base model in safetensors, to compare with ‖W‖; its weights are read in blocks.

    Raises:
        MissingInput, DamagedArtifact, ParamsError: the adapter or the base is not what it should be.
    """
    adapter = read_adapter(folder)
    plain = [pair for pair in adapter.pairs if not adapter.is_bare(pair.module) and not pair.embedding]
    skipped = [pair.module for pair in adapter.pairs if pair not in plain] + [*adapter.copies, *adapter.tokens]
    if adapter.config.get("use_dora"):
        skipped.append("magnitudes (DoRA): what is shown is B·A, before a row's length is set")
    norms = _base_norms(adapter, plain, base) if base is not None else {}
    with Reader(adapter.weights) as reader:
        found = [_layer(adapter, pair, reader, norms.get(pair.module)) for pair in plain]
    typical = statistics.median([layer.norm for layer in found]) if found else 0.0
    found = [x.model_copy(update={"dead": x.norm <= DEAD * typical}) for x in found]
    alive = [layer for layer in found if not layer.dead]
    rank = max((layer.rank for layer in found), default=0)
    suggested, why = _suggestion(alive, rank)
    return Inspection(
        adapter=folder.name,
        rank=rank,
        layers=found,
        skipped=sorted(skipped),
        dead=[layer.name for layer in found if layer.dead],
        suggested_rank=suggested,
        why=why,
    )


def singular_values(b: "torch.Tensor", a: "torch.Tensor", scaling: float = 1.0) -> "torch.Tensor":
    """Return the singular values of scaling·B·A, largest first, in float64, without forming it.

    Args:
        b: (out, rank).
        a: (rank, in).
        scaling: a factor of the product.
    """
    import torch

    left = torch.linalg.qr(b.double(), mode="r").R
    right = torch.linalg.qr(a.double().T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(left @ right.T) * abs(scaling)
    return values


def _layer(adapter: Adapter, pair: Pair, reader: Reader, base_norm: float | None) -> Layer:
    rank, scaling = adapter.rank_and_scaling(pair.module)
    b, a = reader.whole(pair.b), reader.whole(pair.a)
    if not (b.isfinite().all() and a.isfinite().all()):
        raise DamagedArtifact(f"{adapter.weights}: {pair.module} has values that are not finite")
    values = singular_values(b, a, scaling).tolist()
    squares = [value**2 for value in values]
    total = math.fsum(squares)
    energy = [min(1.0, math.fsum(squares[: k + 1]) / total) if total else 0.0 for k in range(len(squares))]
    norm = math.sqrt(total)
    return Layer(
        name=pair.module,
        shape=(pair.b_shape[0], pair.a_shape[1]),
        rank=rank,
        scaling=scaling,
        norm=norm,
        relative=norm / base_norm if base_norm else None,
        singular_values=values,
        effective_rank=_effective_rank(values),
        energy=energy,
        needed=next((k for k, share in enumerate(energy, 1) if share >= ENERGY), 0),
        dead=total == 0,
    )


def _effective_rank(values: list[float]) -> float:
    total = math.fsum(values)
    if total == 0:
        return 0.0
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def _suggestion(alive: list[Layer], rank: int) -> tuple[int | None, str]:
    """A power of two that keeps `ENERGY` in nine layers of ten; twice the rank where the adapter was full."""
    if not alive:
        return None, "no layer learnt anything: look at the learning rate and the data before the rank"
    needed = sorted(layer.needed for layer in alive)[math.ceil(0.9 * len(alive)) - 1]
    share = f"{ENERGY:.0%} of every change in nine layers of ten fits in rank {needed} of {rank}"
    if needed > 0.8 * rank:
        return 2 * rank, f"{share}: the adapter is full, a larger rank may learn more"
    suggested = min(rank, max(2, 1 << (needed - 1).bit_length()))
    return suggested, f"{share}: rank {suggested} is enough" if suggested < rank else f"{share}: the rank is right"


def _base_norms(adapter: Adapter, pairs: list[Pair], base: Path) -> dict[str, float]:
    """Return ‖W‖ of every adapted layer."""
    weights = catalogue(base)
    wanted: dict[str, list[Pair]] = {}
    for pair in pairs:
        name = f"{pair.module}.weight"
        if name not in weights:
            raise DamagedArtifact(f"{base} has no weight {name}: it is not the base of this adapter")
        file, tensor = weights[name]
        shape = (pair.b_shape[0], pair.a_shape[1])
        if tuple(tensor.shape) != (shape[::-1] if adapter.fan_in_fan_out else shape):
            raise DamagedArtifact(f"{base}: {name} is {list(tensor.shape)}, the adapter is for {list(shape)}")
        wanted.setdefault(file, []).append(pair)
    norms = {}
    for file, own in wanted.items():
        with Reader(base / file) as reader:
            for pair in own:
                blocks = reader.blocks(f"{pair.module}.weight")
                norms[pair.module] = math.sqrt(math.fsum(float(x.double().square().sum()) for _, x in blocks))
    return norms
