"""The merge: W + s * B @ A, tensor by tensor and block by block, from safetensors to safetensors.

The sum is made in float32 and rounded once. Memory is bounded by a few blocks (`regraft.export.tensors.BLOCK`) and one
module's factors, whatever the model's size; nothing is mapped into memory. On a 16-bit base the tensors are
bit-identical to those of PEFT's `merge_and_unload`, but where PEFT rounds twice (embeddings, bare parameters: there
`rounding="peft"` does the same) or is wrong (tied embeddings).
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.artifacts import digest_bytes, digest_file, digest_json, pretty_json, read_json, write_json
from regraft.errors import DamagedArtifact, RegraftError
from regraft.export.ahead import AheadReader
from regraft.export.base import read_config
from regraft.export.plan import Plan, Step, Term, plan_merge
from regraft.export.survival import Survival
from regraft.export.tensors import INDEX, Reader, Workspace, Writer, aligned, grid, torch_dtype
from regraft.failpoints import failpoint

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "Rounding", "Weights", "change", "merge", "plan_merge", "read_config"]
log = logging.getLogger("regraft")

Weights = Callable[[Reader, str], "Iterator[tuple[int, torch.Tensor]]"]
"""Where a base tensor's values come from: yields `(first row, rows x width)` in order, see `Reader.blocks`."""
Rounding = Literal["nearest", "stochastic", "peft"]
_SHARDS = "shards.json"


def merge(
    plan: Plan,
    out: Path,
    *,
    weights: Weights = Reader.blocks,
    rounding: Rounding = "nearest",
    partial: Path | None = None,
    key: str = "",
    survival: Survival | None = None,
) -> dict[str, str]:
    """Write the merged tensors into the empty folder `out`, in the base's own sharding, with an index if it had one.

    Args:
        plan: what to do.
        out: an empty folder.
        weights: where the base's values come from.
        rounding: `nearest` rounds the sum once; `stochastic` rounds up or down by chance, in proportion (bf16 only, the
            same each time); `peft` rounds where PEFT does, twice for embeddings and bare parameters.
        partial: a folder on the same disk that keeps finished shards, so that a killed merge goes on; the caller
            removes it in the end.
        key: digest of everything that the result depends on; a partial merge of another key is thrown away.
        survival: measures the change of each module on the way.

    Returns:
        The sha256 of each file of weights.

    Raises:
        DamagedArtifact: a sum is not finite in the type that it is stored in, or a file changed under the merge.
    """
    files = sorted({step.file for step in plan.steps})
    wanted = digest_json([key, rounding, survival is not None, [asdict(step) for step in plan.steps]])
    done = _begin(partial, wanted) if partial else {}
    digests = {}
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        space = Workspace()
        readers = [stack.enter_context(Reader(adapter.weights)) for adapter in plan.adapters]
        for file in files:
            steps = {step.target.name: step for step in plan.steps if step.file == file}
            if partial is not None and _is_whole(partial, file, done):
                digests[file] = done[file]["sha256"]
                if survival is not None:
                    survival.resume(done[file]["survival"])
                log.info("export: %s was merged before", file)
            else:
                made = partial / f"{file}.part" if partial is not None else out / file
                made.unlink(missing_ok=True)
                known = len(survival.layers) if survival is not None else 0
                ordered = aligned([step.target for step in steps.values()])
                sources = [steps[target.name].source for target in ordered if steps[target.name].copy is None]
                with AheadReader(plan.base / file, sources) as reader, Writer(made, ordered) as writer:
                    for target in ordered:
                        step = steps[target.name]
                        for block in _merged(step, reader, readers, weights, rounding, space, survival):
                            writer.block(block)
                digests[file] = writer.sha256
                failpoint("export.shard")
                if partial is not None:
                    made.rename(partial / file)
                    layers = survival.layers[known:] if survival is not None else []
                    done[file] = {"sha256": writer.sha256, "survival": [layer.model_dump() for layer in layers]}
                    write_json(partial / _SHARDS, {"key": wanted, "files": done})
                log.info("export: merged %s (%d tensors)", file, len(steps))
            if partial is not None:
                _link(partial / file, out / file)
            failpoint("export.merge")
    if (plan.base / INDEX).is_file():
        index = {
            "metadata": {"total_size": plan.size},
            "weight_map": {step.target.name: step.file for step in sorted(plan.steps, key=lambda s: s.target.name)},
        }
        (out / INDEX).write_bytes(pretty_json(index))
    return digests


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core, while another writes and digests: blocks fit its cache, and nobody waits at a barrier."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(partial: Path, key: str) -> dict[str, Any]:
    """Return what an earlier attempt at the same merge finished, by file; throw another merge's shards away."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        found = read_json(partial / _SHARDS)
        if found["key"] == key:
            return dict(found["files"])
    except (RegraftError, KeyError, TypeError):
        pass
    for path in partial.iterdir():
        path.unlink()
    return {}


def _is_whole(partial: Path, file: str, done: dict[str, Any]) -> bool:
    return file in done and (partial / file).is_file() and digest_file(partial / file) == done[file]["sha256"]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _merged(
    step: Step,
    reader: Reader,
    adapters: list[Reader],
    weights: Weights,
    rounding: Rounding,
    space: Workspace,
    survival: Survival | None,
) -> "Iterator[torch.Tensor]":
    """Yield the blocks of one tensor of the result, each in memory of the workspace's ring, which the writer outpaces."""
    import torch

    dtype = torch_dtype(step.target.dtype)
    factors = [_Factors(term, adapters[term.adapter]) for term in step.terms]
    norms = _column_norms(step, reader, adapters, weights, factors, space)
    vector = sum((adapters[n].whole(name).float().reshape(-1, 1) * s for n, name, s in step.biases), torch.zeros(()))
    per_matrix = grid(step.target.shape)[1]
    noise = _noise(step.target.name) if rounding == "stochastic" and dtype == torch.bfloat16 else None
    alone = len(factors) == 1 and factors[0].magnitude is None and not step.biases and step.rows is None
    if survival is not None:
        survival.begin(step, factors[0].squares() if alone else None)
    for first, block in _source(step, reader, adapters, weights):
        if not step.terms and not step.biases and step.rows is None:
            yield space.turn("rounded", dtype, *block.shape).copy_(
                block
            )  # a reader may reuse the block's memory at once
            continue
        rows, width = block.shape
        before = space.take("before", torch.float32, rows, width).copy_(block)
        total, delta = before, None
        for each in factors:
            delta = each.block(first, rows, width, per_matrix, space)
            if rounding == "peft" and each.term.rounded_by_peft:
                delta.copy_(delta.to(block.dtype))
            total = torch.add(total, delta, out=space.take("sum", torch.float32, rows, width))
            each.scale(total, first, norms)
        if total is before:
            total = space.take("sum", torch.float32, rows, width).copy_(before)
        if step.biases:
            total.add_(vector[first : first + rows])
        if step.rows is not None:
            _replace_rows(step, adapters, total, first)
        result = space.turn("rounded", dtype, rows, width)
        _round(total, result, noise)
        if survival is not None and step.terms:
            intended = delta if alone and delta is not None else total.sub(before)
            finite = survival.compare(intended, total.copy_(result).sub_(before), before)
        else:
            finite = False
        if not finite and not _finite(result) and _finite(block):
            raise DamagedArtifact(
                f"{step.target.name} is not finite in {step.target.dtype} from row {first} on",
                fix="look at the adapter's weights, or choose bf16 or fp32",
            )
        yield result


def change(step: Step, weight: "torch.Tensor", adapters: list[Reader]) -> "torch.Tensor":
    """Return the whole change of one matrix in float32: the exact sum less the weight."""
    import torch

    space, start = Workspace(), weight.float()
    total = start.clone()
    for term in step.terms:
        each = _Factors(term, adapters[term.adapter])
        total.add_(each.block(0, total.shape[0], total.shape[1], total.shape[0], space))
        each.scale(total, 0, None)
    return torch.sub(total, start)


def _source(
    step: Step, reader: Reader, adapters: list[Reader], weights: Weights
) -> "Iterator[tuple[int, torch.Tensor]]":
    """The values to start from: the base's, with nothing in the rows of new tokens, or an adapter's in the base's type."""
    import torch

    if step.copy is None:
        yield from weights(reader, step.source)
        had = reader.tensors[step.source].shape
        if step.rows is not None and step.target.shape[0] > had[0]:
            yield had[0], torch.zeros(step.target.shape[0] - had[0], *had[1:], dtype=torch_dtype(step.target.dtype))
        return
    number, name = step.copy
    dtype = torch_dtype(reader.tensors[step.source].dtype)
    for first, block in adapters[number].blocks(name):
        yield first, block.to(dtype)


class _Factors:
    """A term's factors in memory, and its change of any block."""

    def __init__(self, term: Term, adapter: Reader) -> None:
        self.term = term
        a, b = adapter.whole(term.pair.a).float(), adapter.whole(term.pair.b).float()
        experts = term.experts
        self._a = a.reshape(experts, -1, a.shape[-1])  # experts x rank x in
        self._b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # experts x out x rank
        self._scaling = term.scaling
        if (scaled := self._b * term.scaling).div(term.scaling).equal(self._b) and math.frexp(term.scaling)[0] == 0.5:
            self._b, self._scaling = scaled, 1.0  # a power of two: the product has the same bits whenever it is scaled
        if term.part is not None:
            self._b = self._b[:, term.part[0] : term.part[1]]
        if experts > 1:
            self._b = self._b.contiguous()
        self.magnitude = adapter.whole(term.pair.magnitude).float().reshape(-1) if term.pair.magnitude else None

    @property
    def by_rows(self) -> bool:
        """DoRA's norms run along stored rows, so a block of rows is enough for them."""
        return not self.term.transposed

    def block(self, first: int, rows: int, width: int, per_matrix: int, space: Workspace) -> "torch.Tensor":
        """The change of `rows` stored rows from `first` on, `rows x width` in float32."""
        import torch

        matrix, first = divmod(first, per_matrix) if self.term.experts > 1 and self.term.expert is None else (0, first)
        expert = self.term.expert if self.term.expert is not None else matrix
        a, b, last = self._a[expert], self._b[expert], first + rows
        if self.term.transposed:
            delta = space.take("delta", torch.float32, width, rows)
            torch.mm(b, a[:, first:last], out=delta)
            return self._scaled(delta).t()
        delta = space.take("delta", torch.float32, rows, width)
        torch.mm(b[first:last], a, out=delta)
        return self._scaled(delta)

    def squares(self) -> float:
        """The sum of squares of the whole change, from products of rank x rank: ‖B A‖² is the sum of BᵀB times AAᵀ."""
        experts = range(len(self._a)) if self.term.expert is None else (self.term.expert,)
        total = 0.0
        for expert in experts:
            a, b = self._a[expert].double(), self._b[expert].double()
            total += float(((b.t() @ b) * (a @ a.t())).sum())
        return total * self._scaling**2

    def _scaled(self, delta: "torch.Tensor") -> "torch.Tensor":
        return delta if self._scaling == 1.0 else delta.mul_(self._scaling)

    def scale(self, total: "torch.Tensor", first: int, norms: "torch.Tensor | None") -> None:
        """DoRA: give each output's weights the length that was learnt (https://arxiv.org/abs/2402.09353)."""
        import torch

        if self.magnitude is None:
            return
        if self.by_rows:
            magnitude = self.magnitude[first : first + total.shape[0]]
            total.mul_((magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1))
            return
        if norms is None:
            norms = torch.linalg.norm(total.t(), dim=1)
        total.mul_((self.magnitude / norms).view(1, -1))


def _column_norms(
    step: Step,
    reader: Reader,
    adapters: list[Reader],
    weights: Weights,
    factors: list[_Factors],
    space: Workspace,
) -> "torch.Tensor | None":
    """DoRA's norms of a weight that is stored `in x out` and larger than a block: one pass more, summed in float64."""
    import torch

    dora = next((each for each in factors if each.magnitude is not None and not each.by_rows), None)
    if dora is None:
        return None
    per_matrix, squares = grid(step.target.shape)[1], None
    for first, block in _source(step, reader, adapters, weights):
        rows, width = block.shape
        if rows == per_matrix:
            return None  # all of it: `scale` takes the norm as PEFT does, to the bit
        total = space.take("sum", torch.float32, rows, width).copy_(block)
        total.add_(dora.block(first, rows, width, per_matrix, space))
        part = total.double().square_().sum(dim=0)
        squares = part if squares is None else squares + part
    return None if squares is None else squares.sqrt().float()


def _replace_rows(step: Step, adapters: list[Reader], total: "torch.Tensor", first: int) -> None:
    assert step.rows is not None
    number, name, rows = step.rows
    here = [(place, row - first) for place, row in enumerate(rows) if first <= row < first + total.shape[0]]
    if here:
        values = adapters[number].whole(name).float()
        for place, row in here:
            total[row] = values[place]


def _noise(name: str) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(int(digest_bytes(name.encode())[:15], 16))


def _round(total: "torch.Tensor", result: "torch.Tensor", noise: "torch.Generator | None") -> None:
    """Round float32 into the result: to nearest, or up or down by chance in proportion to what is cut off."""
    import torch

    if noise is None:
        result.copy_(total)
        return
    bits = total.contiguous().view(torch.int32)
    cut = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=noise)
    up = torch.where(torch.isfinite(total), (bits + cut) & ~0xFFFF, bits)
    result.copy_(up.view(torch.float32))


def _finite(block: "torch.Tensor") -> bool:
    import torch

    if not block.numel():
        return True
    smallest, largest = torch.aminmax(block)  # a NaN comes out as both; no copies, unlike torch.isfinite
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())
