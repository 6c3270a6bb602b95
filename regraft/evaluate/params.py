"""Parameters of evaluation."""

from typing import Annotated, ClassVar

from pydantic import Field

from regraft.late import LateFields
from regraft.params import Section


class EvaluateParams(LateFields, Section):
    """How adapters are scored on the holdout: teacher-forced loss and greedy answers."""

    LATE: ClassVar[frozenset[str]] = frozenset({"gpu_memory"})

    batch_size: int = Field(default=128, ge=1, le=8192)
    """Rows that go through the model at once, at most; 1 to 8192. Only speed and memory depend on it."""

    batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens in a batch, at most, new ones included, at least 1: what bounds memory when rows are long."""

    max_new_tokens: int = Field(default=64, ge=1, le=32_768)
    """Tokens that an answer may have, stop token included; 1 to 32768. A model that does not stop costs all of them."""

    max_rows: int | None = Field(default=None, ge=1)
    """Score at most so many held-out rows, those with the lowest ids (ids are hashes, so it is a fair and stable sample);
    null for all."""

    json_answers: bool = False
    """Answers are JSON: equal values count as equal, however they are written, and validity is measured."""

    slices: list[Annotated[str, Field(min_length=1)]] | None = None
    """Slices to report, by name; null for all that the rows carry."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of torch; null leaves its choice. Sums depend on it, so equal bytes need an equal number."""

    gpu_memory: float | None = Field(default=None, gt=0, le=4096)
    """GiB of the GPU that the base's weights may take, up to 4096; the layers beyond it lie unquantised in the host's
    memory and come to the GPU when they compute, which is slow. Only with `model.quantization.bits: 8`, and never for
    training; null keeps the base on one device."""
