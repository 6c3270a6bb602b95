"""Reading what a safetensors file says about itself, without a library and within limits.

The library builds an object for each tensor before any check (300,000 of them cost 620 MB) and lets names such as
`../../x` through, so a file that comes from elsewhere is looked at here first.
Format: eight bytes little-endian length, a JSON header of that length, then the tensors' bytes
(https://huggingface.co/docs/safetensors/index#format).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import DamagedArtifact, MissingInput

LARGEST_HEADER = 8_000_000
"""Bytes; an adapter on every linear layer of a 126-layer model needs 0.3 MB."""
MOST_TENSORS = 50_000
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,500}\Z")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its dtype as the format spells it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        MissingInput: the file is not there.
        DamagedArtifact: it is not such a file, its header is absurd, a name could escape a folder, or the tensors
            overlap, leave gaps, or do not end where the file does.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(LARGEST_HEADER, size - 8):
                raise DamagedArtifact(
                    f"{path}: a header of {length} bytes in a file of {size}, expected at most {LARGEST_HEADER}"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedArtifact):
            raise
        raise DamagedArtifact(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedArtifact(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MOST_TENSORS:
        raise DamagedArtifact(f"{path}: {len(header)} tensors, expected 1 to {MOST_TENSORS}")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    expected = 8 + length
    for name, tensor in tensors.items():
        if tensor.start != expected:
            raise DamagedArtifact(f"{path}: {name!r} starts at byte {tensor.start}, expected {expected}")
        expected = tensor.end
    if expected != size:
        raise DamagedArtifact(f"{path}: its tensors end at byte {expected}, the file at {size}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    if not _NAME.match(name) or ".." in name:
        raise DamagedArtifact(f"{path}: a tensor named {name[:80]!r}; expected dotted names of letters and digits")
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        plausible = all(type(n) is int and 0 <= n < 2**48 for n in numbers) and len(shape) <= 8
        whole = plausible and dtype in BYTES and end - start == BYTES[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedArtifact(f"{path}: the entry of {name!r} is not dtype, shape and offsets") from error
    if not whole:
        raise DamagedArtifact(f"{path}: {name!r} has {entry}, whose bytes do not match its shape and dtype")
    return Tensor(dtype=dtype, shape=shape, start=base + start, end=base + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content
