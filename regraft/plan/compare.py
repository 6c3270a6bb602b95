"""Tables of methods, and of ranks and targets, for one model."""

from regraft.plan.architecture import Architecture
from regraft.plan.memory import MIB, Prediction, predict
from regraft.plan.setup import Setup

RANKS = (4, 8, 16, 32, 64)
TARGETS = ("q+v", "attention", "mlp", "all-linear")


def methods(architecture: Architecture, setup: Setup) -> list[tuple[str, Prediction]]:
    """Predict full fine-tuning, LoRA on 16 bits, int8 and NF4, each without and with checkpointing."""
    lora = setup.but(method="lora")
    kinds = {
        "full": setup.but(method="full", bits=32),
        "LoRA, 16 bits": lora.but(bits=16),
        "LoRA, int8": lora.but(bits=8),
        "QLoRA, NF4": lora.but(bits=4, double_quant=True),
    }
    found = []
    for name, kind in kinds.items():
        found.append((name, predict(architecture, kind.but(checkpointing=False))))
        found.append((f"{name}, checkpointing", predict(architecture, kind.but(checkpointing=True))))
    return found


def grid(architecture: Architecture, setup: Setup) -> list[tuple[str, int, Prediction]]:
    """Predict every pair of `TARGETS` and `RANKS` with everything else as it is."""
    lora = setup.but(method="lora", rank_pattern=())
    return [
        (targets, rank, predict(architecture, lora.but(targets=targets, rank=rank)))
        for targets in TARGETS
        for rank in RANKS
    ]


def method_lines(rows: list[tuple[str, Prediction]]) -> list[str]:
    """Lay the methods out for a person, in MiB."""
    parts = ("base", "unquantized", "adapter", "gradients", "optimizer", "activations", "logits")
    lines = [f"{'MiB':<30}" + "".join(f"{part:>13}" for part in (*parts, "total"))]
    for name, found in rows:
        values = [getattr(found, part) for part in (*parts, "total")]
        lines.append(f"{name:<30}" + "".join(f"{mib(value):>13}" for value in values))
    return lines


def grid_lines(rows: list[tuple[str, int, Prediction]]) -> list[str]:
    """Lay the ranks and targets out for a person: trained parameters, and the peak in MiB."""
    lines = [f"{'targets':<12}" + "".join(f"{f'rank {rank}':>22}" for rank in RANKS)]
    for targets in TARGETS:
        own = [found for name, _, found in rows if name == targets]
        lines.append(f"{targets:<12}" + "".join(f"{f'{p.trainable:,} / {mib(p.total)}':>22}" for p in own))
    return lines


def mib(size: int) -> str:
    """Return bytes as whole MiB."""
    return f"{size / MIB:,.0f}"
