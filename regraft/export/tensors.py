"""Safetensors files without mmap: `preadv` into a buffer of fixed size, and sequential writing.

Headers are read and checked by `regraft.model.header`; the format is
https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.export.sink import LAG, Sink
from regraft.model.header import BYTES, Tensor, read_header

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK = 2**19  # elements: 2 MB in float32, so that a core's cache holds them from one operation to the next
RING = LAG + 1
"""Buffers that are used in turn: one is being filled, the others may still be read by the writer."""
FLOATS = ("F32", "F16", "BF16")
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_TORCH |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


def torch_dtype(name: str) -> "torch.dtype":
    """Return the torch type of a safetensors type name such as `BF16`."""
    import torch

    found = getattr(torch, _TORCH[name])
    assert isinstance(found, torch.dtype)
    return found


class Reader:
    """Blocks of tensors of one file, read into a few buffers that are used in turn; `tensors` is its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        self._file = path.open("rb", buffering=0)
        self._buffers = [bytearray(0)] * RING
        self._turn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def blocks(self, name: str, elements: int = BLOCK) -> "Iterator[tuple[int, torch.Tensor]]":
        """Yield `(first row, block of rows x width)` of a tensor, at most `elements` each, but one row at least.

        Rows are those of the tensor seen as a matrix (`grid`); a block never crosses from one leading matrix (an
        expert) into the next. It is valid until `RING` more were asked for.
        """
        leading, rows, width = grid(self.tensors[name].shape)
        step = max(1, elements // max(1, width))
        for matrix in range(leading if width else 0):
            for first in range(0, rows, step):
                yield matrix * rows + first, self._read(name, matrix * rows + first, min(step, rows - first))

    def whole(self, name: str) -> "torch.Tensor":
        """Return a tensor in its shape and memory of its own."""
        leading, rows, _ = grid(self.tensors[name].shape)
        return self._read(name, 0, leading * rows).clone().reshape(self.tensors[name].shape)

    def _read(self, name: str, first: int, rows: int) -> "torch.Tensor":
        import torch

        tensor = self.tensors[name]
        dtype, (_, _, width) = torch_dtype(tensor.dtype), grid(tensor.shape)
        row = width * BYTES[tensor.dtype]
        size, done = rows * row, 0
        if size == 0:
            return torch.empty(rows, width, dtype=dtype)
        self._turn = (self._turn + 1) % RING
        if size > len(self._buffers[self._turn]):
            self._buffers[self._turn] = bytearray(size)
        view = memoryview(self._buffers[self._turn])[:size]
        while done < size:
            count = os.preadv(self._file.fileno(), [view[done:]], tensor.start + first * row + done)
            if count == 0:
                raise DamagedArtifact(f"{self.path} ended while {name} was read: it changed under the reader")
            done += count
        return torch.frombuffer(view, dtype=dtype).view(rows, width)


class Workspace:
    """Memory that is used for one block after the other: torch's allocator would keep a dozen of them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._turn = 0

    def take(self, name: str, dtype: "torch.dtype", rows: int, width: int) -> "torch.Tensor":
        """Return a contiguous matrix with arbitrary values; it shares its memory with the last one of this name."""
        import torch

        held = self._held.get((name, dtype))
        if held is None or held.numel() < rows * width:
            held = self._held[name, dtype] = torch.empty(rows * width, dtype=dtype)
        return held[: rows * width].view(rows, width)

    def turn(self, name: str, dtype: "torch.dtype", rows: int, width: int) -> "torch.Tensor":
        """Like `take`, with memory that comes round again after `RING` calls."""
        self._turn = (self._turn + 1) % RING
        return self.take(f"{name} {self._turn}", dtype, rows, width)


def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return leading matrices, rows of each and width: a vector is rows of one, a scalar one row of one."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: name, safetensors type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * BYTES[self.dtype]


class Writer:
    """One safetensors file, written from its first byte to its last; the tensors come in the order of `plan`.

    Sort a plan with wider types first (`aligned`), so that every tensor starts at a multiple of its own element.
    """

    def __init__(self, path: Path, plan: list[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for each in plan:
            end = position + each.size
            header[each.name] = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._expected = path, 8 + len(text) + position
        self._sink = Sink(path)
        self._sink.put(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, trace)
        if kind is None and self._sink.size != self._expected:
            raise RuntimeError(f"{self._path} has {self._sink.size} bytes, its header says {self._expected}: a bug")

    @property
    def sha256(self) -> str:
        """Digest of what was written, once the block has ended."""
        return self._sink.sha256

    def block(self, block: "torch.Tensor") -> None:
        """Append the bytes of a contiguous CPU tensor; they must stay until `RING` more were appended.

        Raises:
            OSError: an earlier block could not be written.
        """
        import torch

        if block.numel():
            self._sink.put(block.reshape(-1).view(torch.uint8).numpy().data)


def aligned(plan: list[Planned]) -> list[Planned]:
    """Sort wider types first and otherwise keep the order."""
    return sorted(plan, key=lambda each: -BYTES[each.dtype])


def shards(folder: Path) -> list[str]:
    """Return the names of a model's weight files: those of its index, else `model.safetensors`.

    Raises:
        MissingInput: there is neither.
        DamagedArtifact: the index is not one, or names a file outside the folder.
    """
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        raise MissingInput(f"{folder} has no {SINGLE} and no {INDEX}", fix="give a model's folder in safetensors")
    content = read_json(folder / INDEX)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DamagedArtifact(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DamagedArtifact(f"{folder / INDEX} names {name!r}, expected a .safetensors file of the same folder")
    return files


def catalogue(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Return every tensor of a model: name to (file, tensor), in the order of files and bytes.

    Raises:
        DamagedArtifact: a name occurs in two files, or the index disagrees with the files' headers.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for file in shards(folder):
        for name, tensor in read_header(folder / file).items():
            if name in found:
                raise DamagedArtifact(f"{folder}: {name} occurs in {found[name][0]} and in {file}")
            found[name] = (file, tensor)
    if (folder / INDEX).is_file():
        listed: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        wrong = sorted(name for name in {*found, *listed} if name not in found or listed.get(name) != found[name][0])
        if wrong:
            raise DamagedArtifact(
                f"{folder / INDEX} disagrees with the files on {len(wrong)} tensors, first {wrong[0]}"
            )
    return found
