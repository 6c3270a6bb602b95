"""How much memory a card has: by name, by size, or the one that is present."""

import re
import subprocess
from dataclasses import dataclass

from regraft.errors import ParamsError

GIB = 2**30
CARDS: dict[str, float] = {
    "rtx2060": 6, "rtx2070": 8, "rtx2080": 8, "rtx2080ti": 11, "rtx3050": 8, "rtx3050-6gb": 6, "rtx3050-laptop": 4,
    "rtx3060": 12, "rtx3060ti": 8, "rtx3070": 8, "rtx3080": 10, "rtx3080-12gb": 12, "rtx3090": 24, "rtx4050-laptop": 6,
    "rtx4060": 8, "rtx4060ti": 8, "rtx4060ti-16gb": 16, "rtx4070": 12, "rtx4070tisuper": 16, "rtx4080": 16,
    "rtx4090": 24, "rtx5060ti-16gb": 16, "rtx5070": 12, "rtx5070ti": 16, "rtx5080": 16, "rtx5090": 32, "gtx1660": 6,
    "t4": 16, "p100": 16, "v100": 16, "v100-32gb": 32, "a2": 16, "a10": 24, "a10g": 24, "a16": 16, "a30": 24, "a40": 48,
    "a4000": 16, "a5000": 24, "a6000": 48, "rtx6000ada": 48, "l4": 24, "l40": 48, "l40s": 48, "a100": 40,
    "a100-80gb": 80, "h100": 80, "h100-nvl": 94, "h200": 141, "b200": 180,
}  # fmt: skip
"""Memory by the vendor's datasheet, in GB, which for these cards are GiB or a little less; smaller twins have a name of
their own."""


_BEFORE_AMPERE = re.compile(r"(^|\W|geforce)(rtx ?20|gtx|titan|quadro|t4\b|p100|v100|p4|m40|k80)")


@dataclass(frozen=True)
class Card:
    """A card and what a process can use of it."""

    name: str
    bytes: int
    present: bool = False

    @property
    def bf16(self) -> bool:
        """It computes in bf16: all from Ampere on do. An older one computes in fp16 (`compute_dtype: auto`)."""
        return not _BEFORE_AMPERE.search(self.name.lower())


def card_named(name: str) -> Card:
    """Return a card by its usual name: `rtx3050`, `RTX 4090`, `a100-80gb`.

    Raises:
        ParamsError: unknown; the message lists the known ones.
    """
    key = re.sub(r"[\s_]|nvidia|geforce", "", name.lower())
    if key not in CARDS:
        raise ParamsError(
            f"no card {name!r} in the table: {', '.join(CARDS)}", fix="give its memory instead, such as --vram 12GiB"
        )
    return Card(key, int(CARDS[key] * GIB))


def card_of_size(size: str) -> Card:
    """Return a card by its memory: `6GiB`, `6144 MiB`, `6gb` (10^9), or `6` for GiB.

    Raises:
        ParamsError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", size.lower())
    units = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6, "tib": 2**40}
    if found is None or found[2] not in units or not float(found[1]):
        raise ParamsError(f"--vram: found {size!r}, expected a size such as 6GiB or 8192MiB")
    return Card(f"{found[1]} {'GiB' if units[found[2]] == GIB else found[2]}", int(float(found[1]) * units[found[2]]))


def present_card() -> Card | None:
    """Return the first card of this machine as `nvidia-smi` names it; None where there is none. Loads no torch."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, _, mib = done.stdout.strip().splitlines()[0].rpartition(",")
        return Card(name.strip(), int(mib) * 2**20, present=True)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
