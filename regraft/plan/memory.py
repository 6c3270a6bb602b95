"""The peak of a training step on a GPU, part by part, from shapes alone.

Weights, adapter, gradients and optimizer are counted exactly, as the libraries allocate them (tests count the bytes of
real tiny models). Activations follow what each operation keeps for the backward pass (`regraft.plan.activations`;
tests compare with the same step traced without data). The CUDA context is a guess until a measurement corrects it.
"""

import math
from dataclasses import dataclass

from regraft.model.adapter import matches
from regraft.plan.activations import activations
from regraft.plan.architecture import Architecture
from regraft.plan.setup import Setup, adapted, is_quantized, plain_bytes

MIB = 2**20
_BLOCK, _NESTED = 64, 256
"""Weights under one scale, and scales under one scale of theirs (bitsandbytes; arXiv:2305.14314)."""
_PAGED = 100_000
"""Values from which on bitsandbytes pages a tensor's states; the scales of their blocks stay on the GPU."""
CUDA_CONTEXT = 450 * MIB
"""What a process holds on a card before its first tensor: the driver's context and loaded kernels. Not measured here."""
CPU_CONTEXT = 390 * MIB
"""What a process on a CPU grows by before its first tensor: the libraries that training loads. Measured once."""
LIBRARIES = 72 * MIB
"""cuBLAS's workspaces with the deterministic setting (32 MiB for the thread of the forward pass, and for that of the
backward pass, which have a handle each), and small change."""


@dataclass(frozen=True)
class Prediction:
    """Bytes at the moment of a step when most is held."""

    base: int
    """Quantised weights with their scales; of a base that is not quantised, all linear layers but the output's."""
    unquantized: int
    """Embeddings, output layer, norms, biases, fused experts, and what `skip_modules` names."""
    adapter: int
    """Trained parameters that the base does not have, in fp32."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Logits of the trained tokens and their gradients, in fp32."""
    workspace: int
    """What one layer's backward pass needs beyond the logits that are gone by then; cuBLAS."""
    context: int
    """Of the driver; on a CPU the loaded libraries."""
    trainable: int
    """Trained parameters (a number, not bytes)."""
    paged: int
    """Bytes of optimizer state that may lie in the host's memory; not part of the total."""

    PARTS = (
        "base",
        "unquantized",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "context",
    )

    @property
    def total(self) -> int:
        """Bytes on the card."""
        return sum(int(getattr(self, part)) for part in self.PARTS)

    @property
    def tensors(self) -> int:
        """Bytes that torch allocates: all but the context."""
        return self.total - self.context

    def to_dict(self) -> dict[str, int]:
        """Every part and the total, in bytes."""
        return {part: getattr(self, part) for part in (*self.PARTS, "total", "trainable", "paged")}


def predict(architecture: Architecture, setup: Setup) -> Prediction:
    """Predict the peak of a training step on one device.

    Raises:
        ParamsError: `target_modules` names no layer.
    """
    base, unquantized, together = *_weights(architecture, setup), 0
    if setup.shards > 1:
        base, unquantized, together = _shared_out(architecture, setup, base, unquantized)
    new = [count for out, into, rank in adapted(architecture, setup).values() for count in (rank * into, out * rank)]
    if setup.dora:
        new += [out for out, _, _ in adapted(architecture, setup).values()]
    if setup.method == "prompt":
        new = [setup.prompt_tokens * architecture.hidden]
    new += [w.size for w in architecture.weights if setup.saved and matches(w.name, setup.saved)]
    new += [architecture.hidden] * (setup.new_tokens + setup.added_tokens * (1 if architecture.tied else 2))
    trained = [w.size for w in architecture.weights] if setup.method == "full" else new
    on_gpu, paged = _optimizer(trained, setup.optimizer)
    kept = activations(architecture, setup)
    return Prediction(
        base=base,
        unquantized=unquantized,
        adapter=-(-4 * sum(new) // setup.shards),
        gradients=-(-4 * sum(trained) // setup.shards),
        optimizer=-(-on_gpu // setup.shards),
        activations=kept.saved,
        logits=kept.logits,
        workspace=max(0, kept.backward - kept.logits) + (LIBRARIES if setup.on_gpu else 0) + together,
        context=CUDA_CONTEXT if setup.on_gpu else CPU_CONTEXT,
        trainable=sum(trained),
        paged=paged,
    )


def quantized_bytes(values: int, rows: int, bits: int, *, double_quant: bool) -> int:
    """Bytes of one quantised matrix with its scales, as bitsandbytes holds it."""
    if bits == 8:
        return values + 4 * rows
    blocks = math.ceil(values / _BLOCK)
    packed, code = math.ceil(values / 2), 16 * 4
    if not double_quant:
        return packed + 4 * blocks + code
    return packed + blocks + 4 * math.ceil(blocks / _NESTED) + 4 + code + 256 * 4  # the scales' own code book


def _shared_out(architecture: Architecture, setup: Setup, base: int, unquantized: int) -> tuple[int, int, int]:
    """Return what one process holds of the base's two parts for good, and what it gathers for a moment.

    4-bit weights are shared out, their scales are not. Gathered are two layers, of which one is fetched while the other
    computes, and the embeddings and output layer.
    """
    packed = sum(math.ceil(w.size / 2) for w in architecture.weights if is_quantized(architecture, w, setup))
    scales = base - packed if setup.bits == 4 else 0
    layers: dict[str, int] = {}
    ends = 0
    for weight in architecture.weights:
        size = weight.size * plain_bytes(setup)
        size = math.ceil(weight.size * setup.bits / 8) if is_quantized(architecture, weight, setup) else size
        layer = next((part for part in weight.name.split(".") if part.isdigit()), None)
        if layer is None:
            ends += size
        else:
            layers[layer] = layers.get(layer, 0) + size
    share = -(-(base - scales) // setup.shards) + scales
    return share, -(-unquantized // setup.shards), 2 * max(layers.values(), default=0) + ends


def _weights(architecture: Architecture, setup: Setup) -> tuple[int, int]:
    base = unquantized = 0
    for weight in architecture.weights:
        if is_quantized(architecture, weight, setup):
            base += quantized_bytes(weight.size, weight.shape[0], setup.bits, double_quant=setup.double_quant)
        elif weight.kind == "linear" and not setup.bits < 16:
            base += weight.size * plain_bytes(setup)
        else:
            unquantized += weight.size * plain_bytes(setup)
        if weight.kind in ("embedding", "output") and weight.shape[0] == architecture.vocabulary:
            unquantized += setup.added_tokens * architecture.hidden * plain_bytes(setup)
    return base, unquantized


def _optimizer(sizes: list[int], name: str) -> tuple[int, int]:
    """Return the bytes of the optimizer's state on the GPU, and those that may be paged out."""
    states = 1 if "lion" in name else 2
    on_gpu = paged = 0
    for size in sizes:
        small = (
            "8bit" not in name or size < 4096
        )  # which keep fp32 states; the others a byte and, for each block, a scale
        held, scales = (4 * size, 0) if small else (size, 4 * math.ceil(size / 256))
        if name.startswith("paged") and size >= _PAGED:
            paged, on_gpu = paged + states * held, on_gpu + states * scales
        else:
            on_gpu += states * (held + scales)
    return on_gpu, paged
