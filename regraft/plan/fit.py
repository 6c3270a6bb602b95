"""The fastest configuration that fits a card, and what it gives up at each step.

The order is the field's: adapters on a 16-bit base where that fits; else on a 4-bit one (QLoRA, arXiv:2305.14314); then
smaller micro-batches with more accumulation, logits in chunks, recomputed activations, a paged optimizer, shorter
sequences, a smaller rank. Where activations have to be recomputed, the 16-bit base is tried once more before the 4-bit
one: at that price it is as fast and not rounded. The last two steps change what is learnt, the others don't or hardly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from regraft.plan.architecture import Architecture
from regraft.plan.memory import Prediction, predict
from regraft.plan.observations import Correction
from regraft.plan.setup import Setup

HEADROOM = 0.05
"""Share of a card that is left free: the allocator keeps pieces that it cannot use."""
_BUSY = 2048
"""Tokens in a micro-batch from which a GPU is well used; fewer at once cost speed."""
_SHORTEST, _LOWEST_RANK, _FEW_LOGITS = 256, 4, 256


@dataclass(frozen=True)
class Step:
    """A change, what it saves, and what it costs."""

    change: str
    gives_up: str
    total: int
    """Bytes that are expected after it."""
    fits: bool


@dataclass(frozen=True)
class Fit:
    """What was found for a card."""

    fits: bool
    setup: Setup
    prediction: Prediction
    total: int
    """Bytes expected, corrected by what was measured on such hardware."""
    limit: int
    """Bytes that may be used."""
    steps: tuple[Step, ...]


def fit(architecture: Architecture, wanted: Setup, card_bytes: int, correction: Correction | None = None) -> Fit:
    """Return the first configuration of the guide's order that fits, or the smallest with `fits` false.

    Args:
        architecture: the model.
        wanted: what the parameters ask for: targets, rank, sequence length and batch are kept as long as they can be.
        card_bytes: memory of the card.
        correction: what was learnt from earlier trainings on such hardware.
    """
    limit = int(card_bytes * (1 - HEADROOM))
    steps: list[Step] = []
    for setup, change, gives_up in _candidates(wanted, can_chunk=not architecture.softcap):
        prediction = predict(architecture, setup)
        total = expected_bytes(prediction, correction)
        steps.append(Step(change, gives_up, total, total <= limit))
        if total <= limit:
            return Fit(True, setup, prediction, total, limit, tuple(steps))
    return Fit(False, setup, prediction, total, limit, tuple(steps))


def expected_bytes(prediction: Prediction, correction: Correction | None) -> int:
    """Return the total, corrected where there is a correction."""
    return prediction.total if correction is None else correction.applied(prediction)


def settings_of(before: Setup, after: Setup, *, alpha: float, max_length: int) -> dict[str, object]:
    """Return the keys of `params.yaml` that differ between two setups, dotted, with their new values.

    Args:
        before: what the parameters say now.
        after: the configuration to use.
        alpha: `train.alpha` now; with a smaller rank it shrinks in proportion, so that the adapter's scale stays.
        max_length: `preprocess.max_length` now; a shorter block lowers it, too.
    """
    pairs = {
        "model.quantization.bits": (before.bits, after.bits),
        "train.rank": (before.rank, after.rank),
        "train.alpha": (alpha, alpha * after.rank / before.rank),
        "train.batch_size": (before.batch, after.batch),
        "train.accumulation": (before.accumulation, after.accumulation),
        "train.logits_chunk": (before.chunk, after.chunk),
        "train.gradient_checkpointing": (before.checkpointing, after.checkpointing),
        "train.optimizer": (before.optimizer, after.optimizer),
        "preprocess.block_length": (before.length, after.length),
        "preprocess.max_length": (max_length, min(max_length, after.length)),
    }
    changed: dict[str, object] = {key: new for key, (old, new) in pairs.items() if old != new}
    return changed


def _candidates(wanted: Setup, *, can_chunk: bool) -> Iterator[tuple[Setup, str, str]]:
    """Every configuration of the guide, each with the change that led to it and its price."""
    fast = wanted.but(checkpointing=False)
    if wanted.method != "lora":
        yield wanted, f"{wanted.method}, as the parameters say", "nothing"
        yield from _smaller_batches(wanted, "", least=1)
        yield from _recomputed(wanted)
        return
    sixteen = fast.but(bits=16)
    yield sixteen, "LoRA on the 16-bit base", "nothing"
    yield from _smaller_batches(sixteen, "16 bits, ", least=_BUSY)
    four = fast.but(bits=4)
    yield four, "base in NF4 (QLoRA)", "a tenth to a quarter of the speed; weights rounded to 4 bits"
    yield from _smaller_batches(four, "NF4, ", least=1)
    if can_chunk and four.trained * four.tokens > _FEW_LOGITS and (four.chunk is None or four.chunk > _FEW_LOGITS):
        sixteen, four = sixteen.but(chunk=_FEW_LOGITS), four.but(chunk=_FEW_LOGITS)
        price = "about a twentieth of the speed: logits are made twice"
        for batch in (four.batch, *_halves(four.batch)):
            smaller = _micro(four, batch)
            yield smaller, f"NF4, logits of {_FEW_LOGITS} tokens at once, micro-batch {smaller.batch}", price
    yield from _recomputed(sixteen, "16 bits, ", least=_BUSY)
    yield from _recomputed(four)
    small = _micro(four, 1).but(checkpointing=True, optimizer="paged_adamw_8bit")
    yield small, "optimizer paged_adamw_8bit", "optimizer states in 8 bits, moved to the host when the card is full"
    while small.length // 2 >= _SHORTEST:
        small = small.but(length=small.length // 2)
        yield small, f"sequences of {small.length}", "longer conversations are left out (preprocess.too_long)"
    while small.rank // 2 >= _LOWEST_RANK:
        small = small.but(rank=small.rank // 2)
        yield small, f"rank {small.rank}", "capacity of the adapter; alpha shrinks with it, the scale stays"


def _smaller_batches(setup: Setup, what: str, *, least: int) -> Iterator[tuple[Setup, str, str]]:
    for batch in _halves(setup.batch):
        if batch * setup.length >= least:
            smaller = _micro(setup, batch)
            change = f"{what}micro-batch {smaller.batch}, accumulation {smaller.accumulation}"
            few = smaller.tokens < _BUSY
            yield smaller, change, "speed: the GPU is not filled" if few else "hardly any speed; the same step"


def _recomputed(setup: Setup, what: str = "", *, least: int = 1) -> Iterator[tuple[Setup, str, str]]:
    price = "about a quarter of the speed: activations are computed twice"
    for batch in (setup.batch, *_halves(setup.batch)):
        smaller = _micro(setup, batch).but(checkpointing=True)
        if smaller.tokens >= least:
            yield smaller, f"{what}gradient checkpointing, micro-batch {smaller.batch}", price


def _halves(batch: int) -> list[int]:
    found = []
    while batch > 1:
        batch = batch // 2
        found.append(batch)
    return found


def _micro(setup: Setup, batch: int) -> Setup:
    """Return the same step in smaller pieces, as small as the objective allows; rounded up where it does not divide."""
    batch = max(batch, setup.least_batch)
    return setup.but(batch=batch, accumulation=-(-setup.batch * setup.accumulation // batch))
