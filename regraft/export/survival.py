"""Delta survival: how much of the change that an adapter asks for is still there once the sum was rounded.

A merge into few bits can lose it: with ‖ΔW‖/‖W‖ of 1 % the change that 4-bit weights really make had cosine 0.03 with
the one that was learnt (peft #2105 and #2321 tell of models that "forgot" their fine-tuning).
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from regraft.export.plan import Step


class Survived(BaseModel):
    """One tensor's change: the one intended (Δ) beside the one that the stored weights make."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    cosine: float
    """Of the effective change with the intended one; 1 is perfect, 0 means that nothing of it is left."""
    norm: float
    """‖effective‖ / ‖intended‖."""
    relative: float
    """‖intended‖ / ‖W‖."""
    size: float
    """‖intended‖."""


class Survival:
    """Sums over the blocks of a merge; `layers` has the result."""

    def __init__(self) -> None:
        self._known: list[Survived] = []
        self._names: list[str] = []
        self._sums: list[list[float]] = []
        self._size: float | None = None

    def resume(self, layers: Iterable[object]) -> None:
        """Take in what an earlier attempt measured."""
        self._known = [*self.layers, *(Survived.model_validate(layer) for layer in layers)]
        self._names, self._sums = [], []

    def begin(self, step: "Step", squares: float | None = None) -> None:
        """Name the tensor that the next blocks belong to, with the sum of squares of the intended change where it is known."""
        self._size = squares
        if step.terms:
            self._names.append(step.target.name)
            self._sums.append([0.0, 0.0, squares or 0.0, 0.0])

    def compare(self, intended: "torch.Tensor", effective: "torch.Tensor", weight: "torch.Tensor") -> bool:
        """Take in a change as it was meant, as it is, and the weight that it changes; all in float32.

        Returns:
            Whether every value of all three is known to be finite (a sum can overflow where they are).
        """
        sums = self._sums[-1]
        pairs = {0: (effective, intended), 1: (effective, effective), 3: (weight, weight)}
        if self._size is None:
            pairs[2] = (intended, intended)
        for place, (one, other) in pairs.items():
            sums[place] += _dot(one, other)
        return all(map(math.isfinite, sums))

    @property
    def layers(self) -> list[Survived]:
        """What survived, tensor by tensor."""
        found = list(self._known)
        for name, (both, effective, intended, weight) in zip(self._names, self._sums, strict=True):
            product = (effective * intended) ** 0.5
            found.append(
                Survived(
                    name=name,
                    cosine=both / product if product else float(effective == intended),
                    norm=(effective / intended) ** 0.5 if intended else float(not effective),
                    relative=(intended / weight) ** 0.5 if weight else 0.0,
                    size=intended**0.5,
                )
            )
        return found


def _dot(one: "torch.Tensor", other: "torch.Tensor") -> float:
    """Sum of products of two contiguous blocks in float32; the sum over blocks is in float64."""
    import torch

    return float(torch.dot(one.reshape(-1), other.reshape(-1)))


def worst(layers: Iterable[Survived], count: int = 5) -> list[Survived]:
    """Return the layers that lost most."""
    return sorted(layers, key=lambda layer: layer.cosine)[:count]


def overall(layers: Iterable[Survived]) -> float | None:
    """Return the cosine of all changes taken as one vector; None where nothing was to change."""
    both = effective = intended = 0.0
    for each in layers:
        length = each.size * each.norm
        both, effective, intended = (
            both + each.cosine * each.size * length,
            effective + length**2,
            intended + each.size**2,
        )
    product = (effective * intended) ** 0.5
    return both / product if product else (0.0 if intended else None)


def table(layers: Iterable[Survived], count: int = 3) -> str:
    """The layers that lost most, in words."""
    return "; ".join(
        f"{each.name}: cosine {each.cosine:.3f}, norm {each.norm:.3f} (a change of {each.relative:.2%} of the weight)"
        for each in worst(layers, count)
    )
