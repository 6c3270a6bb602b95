"""How fast training goes: tokens, useful tokens and floating-point operations a second, memory. Never an input."""

import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.train.loop import Progress

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}
"""Dense 16-bit operations a second of data sheets, by a part of the GPU's name; the first that fits counts."""


class Speed:
    """Counts what went through the model, and by when."""

    def __init__(self, flops_per_token: float) -> None:
        self.flops_per_token = flops_per_token
        self.cpu_began = time.process_time()
        self._last: tuple[float, int, int] | None = None

    def note(self, file: Path, step: int, progress: "Progress") -> str:
        """Append a line on the time since the last call to a file, and return it as words for a log."""
        now, before = time.monotonic(), self._last
        self._last = (now, progress.computed, progress.seen)
        if before is None or now <= before[0]:
            return ""
        seconds = now - before[0]
        line = {"step": step, **rates(progress.computed - before[1], progress.seen - before[2], seconds, self)}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return f", {line['useful_tokens_per_second']:,.0f} tokens/s"


def rates(computed: int, seen: int, seconds: float, speed: Speed) -> dict[str, Any]:
    """Return tokens a second with and without padding, operations a second, their share of the peak, and memory."""
    import torch

    on_gpu = torch.cuda.is_available()
    flops, peak = seen * speed.flops_per_token / seconds, peak_flops()
    return {
        "tokens_per_second": round(computed / seconds, 1),
        "useful_tokens_per_second": round(seen / seconds, 1),
        "flops_per_second": round(flops),
        "mfu": round(flops / peak, 4) if peak else None,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if on_gpu else None,
    }


def peak_flops() -> float | None:
    """The GPU's peak by its data sheet; None for a CPU or a GPU that is not listed."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(model: Any, trained: int, *, full: bool) -> float:
    """Operations that one token needs, after the usual count of 2 for each weight forward and 4 backward.

    Frozen weights need no gradients of their own: 4 instead of 6. Attention's own products and the output layer, which
    only trained tokens reach, are left out, so the utilisation is a little too low, never too high.

    Args:
        model: the base, with an adapter or without.
        trained: number of trained weights.
        full: all of them are the base's.
    """
    from regraft.model.adapter import linear_modules

    output = model.get_output_embeddings()
    names = linear_modules(model)
    frozen = sum(out * width for name, (out, width) in names.items() if not _is_output(model, name, output))
    return 6.0 * frozen if full else 4.0 * frozen + 6.0 * trained


def _is_output(model: Any, name: str, output: Any) -> bool:
    try:
        return model.get_submodule(name) is output
    except AttributeError:
        return name.endswith(("lm_head", "embed_out"))
