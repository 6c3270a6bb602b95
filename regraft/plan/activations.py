"""What a forward pass keeps for the backward pass, operation by operation, as transformers and PEFT run it on a GPU.

Bytes for each token of a batch, under autocast. The stream between layers is of the type that embeddings and norms are
held in: 16 bits, or fp32 where a quantised base's are cast to it. Frozen layers keep nothing of their input; an adapted
one keeps the input of A and of B. With checkpointing only each layer's input is kept, and one layer at a time is computed again.
"""

from dataclasses import dataclass

from regraft.plan.architecture import Architecture
from regraft.plan.setup import Setup, adapted, is_quantized, plain_bytes


@dataclass(frozen=True)
class Kept:
    """Bytes of one batch."""

    saved: int
    """Held when the backward pass starts."""
    logits: int
    """Largest at the start of the backward pass: the log-softmax, its gradient, and the gradient of the loss."""
    backward: int
    """What the backward pass of the dearest layer needs on top of `saved`."""


_AFTER_ATTENTION = ("o_proj", "dense")
_LIGER = ("llama", "mistral", "qwen2")
"""Families whose norms, gates and rotary embeddings `liger-kernel` replaces, all of them."""
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def activations(architecture: Architecture, setup: Setup) -> Kept:
    """Return what a batch of `setup` keeps of a model."""
    a, tokens = architecture, setup.tokens
    stream = _stream(setup)
    layers = _layers(a, setup)
    if setup.checkpointing:
        saved = stream * a.hidden * tokens * a.layers
        recomputed = max(layers.values(), default=0) * tokens
    else:
        saved = sum(layers.values()) * tokens - _first_layer_saves(a, setup) * tokens
        recomputed = 0
    saved += _norm(a, setup) * tokens  # the last norm's input
    saved += _casts(a, setup)
    if setup.attention == "mask":
        saved += tokens * setup.length  # which positions see which, once for all layers
    trained = int(setup.trained * tokens)
    per_logit, states = 12 + (2 if a.softcap else 0), 0
    if setup.chunk is not None and not a.softcap:
        saved += stream * a.hidden * trained  # of each chunk's states, or their gradient
        if (
            not setup.remade
        ):  # logits and their softmax, while the forward pass still holds the states beside the gradient
            per_logit, states = 8, stream * a.hidden * trained
        trained = min(trained, setup.chunk)
    logits = per_logit * a.vocabulary * trained + states
    if _stream(setup) == 4 and setup.compute_bytes == 2:
        logits += 2 * a.vocabulary * a.hidden  # autocast's copy of the output layer
    widest = max((out * into for out, into in a.linears().values()), default=0)
    whole = setup.fused and setup.bits >= 16
    weight = 0 if whole else setup.compute_bytes * widest  # a quantised layer's, dequantised for its backward pass
    if setup.checkpointing and setup.compute_bytes == 2 and setup.bits <= 16:
        transient = max(
            int(tokens * (i * a.intermediate + h * a.hidden)) + w * weight for w, i, h in _PASSING[_kind(a, setup)]
        )
    else:
        transient = tokens * (stream * a.intermediate + 8 * a.hidden) + weight
    return Kept(saved=saved, logits=logits, backward=recomputed + transient)


_PASSING = {
    "16 bits": ((0, 6.0, 6.0),),
    "16-bit stream": ((1, 1.15, 2.0), (0, 3.0, 1.0)),
    "16-bit stream, Liger": ((1, 1.15, 2.0),),  # its gates' gradients take their inputs' places
    "fp32 stream": ((1, 2.3, 4.0), (0, 8.0, 2.0)),
}
"""What one recomputed layer's backward pass holds for a moment beside what it keeps: whether a dequantised weight is
there, bytes for each token and unit of the feed-forward layer, and of the stream. Where there are two such moments (the
down projection, the gate), the larger counts. Read off steps of three sizes and three lengths traced without data."""


def _kind(a: Architecture, setup: Setup) -> str:
    if _stream(setup) == 4:
        return "fp32 stream"
    if setup.bits == 16 and not setup.fused:
        return "16 bits"
    return "16-bit stream, Liger" if setup.liger and a.family in _LIGER else "16-bit stream"


def _stream(setup: Setup) -> int:
    return max(setup.compute_bytes, plain_bytes(setup))


def _layers(a: Architecture, setup: Setup) -> dict[int, int]:
    """Bytes for each token, by layer."""
    carriers: dict[int, dict[str, tuple[int, int, int]]] = {index: {} for index in range(a.layers)}
    for name, shape in adapted(a, setup).items():
        index = next(int(part) for part in name.split(".") if part.isdigit())
        carriers[index][name.rpartition(".")[2]] = shape
    common = _common(a, setup)
    return {index: common + _inputs(a, setup, found) for index, found in carriers.items()}


def _common(a: Architecture, setup: Setup) -> int:
    """What a layer keeps whatever carries an adapter."""
    stream, c = _stream(setup), setup.compute_bytes
    norms = a.norms * 4 * (a.hidden + (2 if a.layer_norm else 1))
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    keys = kv if setup.attention == "lengths" else q  # with a mask, keys and values are repeated for every query head
    attention = c * (2 * q + 2 * keys) + 4 * a.heads
    if setup.attention == "mask":
        attention += c * setup.length
    if setup.attention == "eager":  # softmax in fp32, its 16-bit copy, and the capped scores
        attention += a.heads * setup.length * (4 + c + (c if a.softcap else 0))
    if a.head_norms:
        attention += 4 * (q + kv + a.heads + a.kv_heads)
    if setup.liger and a.family in _LIGER:
        return a.norms * (stream * a.hidden + 4) + attention + 2 * stream * a.intermediate
    inner = stream * a.intermediate * {"gpt2": 4}.get(a.family, 3 if a.gated else 1)  # GPT-2's GELU is four operations
    return norms + attention + inner


def _inputs(a: Architecture, setup: Setup, carriers: dict[str, tuple[int, int, int]]) -> int:
    """What the adapters of one layer keep: the inputs of A and of B."""
    c, total = setup.compute_bytes, 0
    # PEFT leaves a quantised layer's input to autocast: one in 16 bits is kept as it is, once for all who read it.
    shared = (setup.bits < 16 or setup.fused) and _stream(setup) == c and not setup.dropout
    read: set[str] = set()
    for name, (out, into, rank) in carriers.items():
        total += c * rank
        if setup.dropout:
            total += into  # the mask
        # Each adapter has a 16-bit copy of its own: PEFT casts to fp32, autocast back. Of a quantised layer's input
        # only what is fp32 is cast, and the attention's output is 16-bit already.
        source = _SAME_INPUT.get(name, name)
        copied = (setup.bits == 16 and not setup.fused) or setup.dropout
        if (copied or name not in _AFTER_ATTENTION) and not (shared and source in read):
            total += c * into
        read.add(source)
        if setup.dora:
            total += 2 * c * out
    return total


def _first_layer_saves(a: Architecture, setup: Setup) -> int:
    """The first layer's first norm has an input without gradient and keeps nothing, where embeddings are frozen."""
    return 0 if setup.method == "full" else _norm(a, setup)


def _norm(a: Architecture, setup: Setup) -> int:
    """What a norm keeps of a token's state: the state in fp32, or as it was."""
    return (_stream(setup) if setup.liger and a.family in _LIGER else 4) * a.hidden


def _casts(a: Architecture, setup: Setup) -> int:
    """16-bit copies of fp32 weights that autocast makes and the backward pass keeps: A, B, linear layers held in fp32."""
    if setup.compute_bytes == 4:
        return 0
    layers = 1 if setup.fused and setup.checkpointing else a.layers  # fused, they last as long as what a layer keeps
    copies = sum(rank * (out + into) for out, into, rank in adapted(a, setup).values()) * layers // a.layers
    if plain_bytes(setup) == 4:
        copies += sum(w.size for w in a.weights if w.kind == "linear" and not is_quantized(a, w, setup))
    return setup.compute_bytes * copies
