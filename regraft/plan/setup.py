"""What of the parameters decides how much memory a training takes, and which layers get an adapter."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from regraft.errors import ParamsError
from regraft.model.adapter import matches
from regraft.model.params import ModelParams, keeps_fp32
from regraft.plan.architecture import Architecture, Weight
from regraft.train.loss import CHUNK
from regraft.train.params import PRESETS, TrainParams
from regraft.train.targets import in_group


@dataclass(frozen=True)
class Setup:
    """One configuration of a training, as far as memory goes."""

    bits: int = 4
    double_quant: bool = True
    skip_modules: tuple[str, ...] = ()
    compute_bytes: int = 2
    """Bytes of a value that matrices are multiplied in: 2 for bf16 and fp16, 4 for fp32."""
    method: str = "lora"
    rank: int = 16
    rank_pattern: tuple[tuple[str, int], ...] = ()
    targets: str | tuple[str, ...] = "all-linear"
    dropout: bool = False
    dora: bool = False
    prompt_tokens: int = 16
    saved: tuple[str, ...] = ()
    """Modules that are trained whole (`modules_to_save`)."""
    new_tokens: int = 0
    """Embeddings that are trained by themselves (`trainable_tokens`)."""
    added_tokens: int = 0
    """Tokens that the base lacks (`model.new_tokens`): a row more at both ends for each, trained."""
    batch: int = 8
    length: int = 1024
    """Tokens of a packed block; with preferences, of a prompt with its answer."""
    answers: int = 1
    """Sequences of each of the batch's rows: 2 with preferences, whose two answers go through the model together."""
    least_batch: int = 1
    """Rows that a batch must have: kto compares answers of several."""
    accumulation: int = 1
    trained: float = 1.0
    """Share of the tokens that carry a loss: logits exist only for them."""
    checkpointing: bool = False
    optimizer: str = "adamw_torch"
    attention: str = "mask"
    """What keeps packed documents apart: a `mask` over all pairs of positions, a kernel that knows `lengths`, or plain
    matrix products (`eager`)."""

    chunk: int | None = None
    """Trained tokens whose logits are held at once (`logits_chunk`, or `kernels: fused` on a GPU); None for all."""
    remade: bool = False
    """A chunk's logits are made again in the backward pass, not used up at once: the output layer is trained, or fp16 is
    computed in, or the objective has chunks of its own."""
    fused: bool = False
    """Adapted layers are one operation each (`kernels: fused`), which keeps an input once for all that read it."""
    liger: bool = False
    """Norms and gates are Liger's, for the architectures that it has them for: they keep their inputs alone."""
    unquantized_fp32: bool = False
    """What stays unquantised of a 4- or 8-bit base is cast to fp32, and with it the stream between layers."""
    shards: int = 1
    """Processes that base, adapter, gradients and optimizer are shared out over (`sharding: full`)."""
    on_gpu: bool = True
    """A CPU has no context of a driver and no workspace of cuBLAS, but the libraries count."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.batch * self.answers * self.length

    def but(self, **changes: object) -> "Setup":
        """Return a copy with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def setup_from(
    train: TrainParams, model: ModelParams, *, length: int, trained: float = 1.0, on_gpu: bool = True, bf16: bool = True
) -> Setup:
    """Read a setup out of the parameters.

    Args:
        train: section `train`.
        model: section `model`.
        length: tokens of a packed block.
        trained: share of the tokens that carry a loss; 1 where that is not known yet.
        on_gpu: `compute_dtype: auto` is 16 bits there, and fp32 on a CPU.
        bf16: the GPU computes in bf16; where it cannot, `auto` is fp16, and what stays unquantised is cast to fp32.
    """
    quantization = model.quantization
    pairs, odds = train.objective != "supervised", train.objective == "orpo"
    targets = train.target_modules
    sixteen = quantization.compute_dtype in ("bf16", "fp16") or (quantization.compute_dtype == "auto" and on_gpu)
    fused = train.kernels == "fused" and sixteen
    fp16 = quantization.compute_dtype == "fp16" or (quantization.compute_dtype == "auto" and on_gpu and not bf16)
    return Setup(
        bits=quantization.bits,
        double_quant=quantization.double_quant,
        skip_modules=tuple(quantization.skip_modules),
        compute_bytes=2 if sixteen else 4,
        method=train.method,
        rank=train.rank,
        rank_pattern=tuple(train.rank_pattern.items()),
        chunk=train.logits_chunk
        or (CHUNK if train.kernels == "fused" and on_gpu and train.method != "prompt" and not odds else None)
        # TRL makes and forgets logits in chunks, but for ORPO's, which it makes of every position.
        or (CHUNK if pairs and not odds else None),
        remade=fp16 or pairs or bool(train.modules_to_save or train.trainable_tokens or model.new_tokens),
        fused=fused and quantization.bits in (4, 16) and not (train.dropout or train.dora),
        liger=fused and on_gpu and find_spec("liger_kernel") is not None,
        unquantized_fp32=keeps_fp32(quantization.unquantized, fp16=fp16),
        shards=train.processes if train.sharding == "full" else 1,
        on_gpu=on_gpu,
        targets=targets if isinstance(targets, str) else tuple(targets),
        dropout=train.dropout > 0,
        dora=train.dora,
        prompt_tokens=train.prompt_tokens,
        batch=train.batch_size,
        length=length,
        answers=2 if pairs else 1,
        least_batch=2 if train.objective == "kto" else 1,
        accumulation=train.accumulation,
        trained=1.0 if odds else trained,
        checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer,
        attention=_attention("sdpa" if pairs and model.attention != "eager" else model.attention, on_gpu),
        saved=tuple(train.modules_to_save),
        new_tokens=len(train.trainable_tokens),
        added_tokens=len(model.new_tokens),
    )


def is_quantized(architecture: Architecture, weight: Weight, setup: Setup) -> bool:
    """Say whether a weight is held in fewer than 16 bits."""
    if architecture.family == "falcon":  # a linear layer of its own class, which transformers 5.23 leaves as it is
        return False
    skipped = any(weight.name.startswith(name) or weight.name.endswith(name) for name in setup.skip_modules)
    return weight.kind == "linear" and setup.bits < 16 and not skipped


def plain_bytes(setup: Setup) -> int:
    """Bytes of a value of the base that is not quantised."""
    if setup.bits == 16:
        return 2
    return 4 if setup.bits == 32 or setup.unquantized_fp32 else setup.compute_bytes


def adapted(architecture: Architecture, setup: Setup) -> dict[str, tuple[int, int, int]]:
    """Return (out, in, rank) of every layer that carries an adapter.

    Raises:
        ParamsError: `target_modules` names no layer.
    """
    if setup.method != "lora":
        return {}
    linears = architecture.linears()
    names = set(_chosen(linears, setup.targets))
    patterns = dict(setup.rank_pattern)
    found = {}
    for name, shape in linears.items():
        if name in names:
            rank = next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), setup.rank)
            found[name] = (*shape, rank)
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ParamsError(
            f"train.target_modules: {setup.targets} names no linear layer; this base has {known}",
            fix="edit params.yaml",
        )
    return found


def _chosen(names: Iterable[str], targets: str | tuple[str, ...]) -> list[str]:
    if isinstance(targets, tuple):
        return [name for name in names if matches(name, targets)]
    if targets in PRESETS:
        return [name for name in names if in_group(name, targets)]
    return [name for name in names if re.fullmatch(targets, name)]


def _attention(asked: str, on_gpu: bool) -> str:
    if asked == "auto":
        return "lengths" if on_gpu else "mask"
    return {"flex": "lengths", "varlen": "lengths", "eager": "eager"}.get(asked, "mask")
