"""Parameters of training."""

import re
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from regraft.late import LateFields
from regraft.params import Section

_Name = Annotated[str, Field(min_length=1, max_length=200)]

PRESETS = ("all-linear", "attention", "q+v", "mlp")
"""Names of groups of layers that `target_modules` may give; `regraft.train.targets` finds their layers in a model."""


Objective = Literal["supervised", "dpo", "orpo", "kto"]
PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
]
UnpairedLoss = Literal["kto", "apo_zero_unpaired"]


class PreferenceParams(Section):
    """How strongly preferences pull, for the objectives `dpo`, `orpo` and `kto`; the losses are TRL's."""

    beta: float = Field(default=0.1, gt=0, le=100)
    """dpo and kto: how dear each nat is by which the adapter goes away from the reference (for `ipo` its tau); orpo: the
    weight of the odds ratio beside the likelihood (the paper's lambda). Above 0, up to 100."""

    loss: PairLoss | UnpairedLoss | None = None
    """Which loss of its family: for dpo `sigmoid` (the paper's), `ipo`, `hinge` and others that TRL has; for kto `kto`
    or `apo_zero_unpaired`. Null is the paper's. orpo has one only."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the preferences that may be the wrong way round; 0 to below 0.5. Only for dpo's `robust`, `exo_pair`,
    `aot` and `aot_unpaired`; `exo_pair` needs one above 0."""

    desirable_weight: float = Field(default=1.0, gt=0, le=100)
    """kto: weight of the answers that are wanted; above 0, up to 100. With many fewer of them, more than 1."""

    undesirable_weight: float = Field(default=1.0, gt=0, le=100)
    """kto: weight of the answers that are not wanted; above 0, up to 100."""


class TrainParams(LateFields, Section):
    """How an adapter is trained; LoRA after arXiv:2106.09685, on a quantised base after arXiv:2305.14314."""

    LATE: ClassVar[frozenset[str]] = frozenset({"logits_chunk", "objective", "preference", "sharding"})

    method: Literal["lora", "full", "prompt"] = "lora"
    """What is trained. `lora`: an adapter, the only one that can be registered. `full`: every weight of the base, and
    `prompt`: some vectors before each conversation (arXiv:2104.08691); both are yardsticks to compare an adapter with."""

    objective: Objective = "supervised"
    """What is learned. `supervised`: the answers of conversations. From preferences (`data.layout: preference`): `dpo`
    (arXiv:2305.18290) and `orpo` (arXiv:2403.07691) from pairs, `kto` (arXiv:2402.01306) from pairs and from single
    answers with a label. They need the extra `preference` (TRL)."""

    preference: PreferenceParams = Field(default_factory=PreferenceParams)
    """Only for `objective` dpo, orpo and kto."""

    seed: int = Field(default=7, ge=0, lt=2**31)
    """Seeds A's initial values, dropout and the order of the data; 0 to 2^31 - 1."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of every adapter; 1 to 1024. Its size and cost grow in proportion."""

    alpha: float = Field(default=32, gt=0, le=8192)
    """Scale: the adapter's output is multiplied by alpha / rank; up to 8192. Twice the rank is a common start."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732): high ranks then learn as fast as low ones."""

    dora: bool = False
    """Learn the length of each weight's rows apart from their direction (DoRA, arXiv:2402.09353): nearer to full
    fine-tuning at low ranks, for about twice the time of a step."""

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """Where A and B begin. `default`: A random, B zero. `gaussian`: A normal. `orthogonal`: both orthonormal halves of a
    basis, B·A zero. `pissa` (arXiv:2404.02948) and `olora` (arXiv:2406.01775): the base's principal part, on a base of
    16 or 32 bits; saved as a plain adapter of twice the rank. `loftq` (arXiv:2310.08659): what 4-bit quantisation lost.
    `eva` (arXiv:2410.07170): directions in which the inputs of the training set vary most."""

    rank_pattern: dict[_Name, Annotated[int, Field(ge=1, le=1024)]] = Field(default_factory=dict)
    """Other ranks for some layers: the end of a layer's path, or a regular expression for it, to a rank of 1 to 1024."""

    alpha_pattern: dict[_Name, Annotated[float, Field(gt=0, le=8192)]] = Field(default_factory=dict)
    """Other alphas for some layers, named as in `rank_pattern`; up to 8192."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped while training; 0 to below 1. Helps small data sets, costs time."""

    target_modules: _Name | Annotated[list[_Name], Field(min_length=1)] = "all-linear"
    """Which linear layers get an adapter: `all-linear` (all but the output layer), `attention`, `q+v`, `mlp`, a list of
    last names such as `q_proj`, or a regular expression for a layer's whole path. The report lists what was matched."""

    modules_to_save: list[_Name] = Field(default_factory=list)
    """Modules that are trained whole and saved beside the adapter, by last name, such as `lm_head` or `norm`. A tied
    embedding is trained and saved once."""

    trainable_tokens: list[_Name] = Field(default_factory=list)
    """Tokens of the tokenizer whose embeddings are trained too, such as reserved ones that this data gives a meaning;
    the other embeddings stay frozen. Where input and output embeddings are tied, both change."""

    parent: str | None = Field(default=None, min_length=1)
    """Folder of an adapter to go on from, such as the champion's; null starts afresh. `regraft parent` fetches the
    champion's and writes this. It must be of the same rank and layers; not with an `init` other than `default`."""

    parent_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the parent, 64 hexadecimal digits: a folder's content can change, the adapter that was meant cannot."""

    prompt_tokens: int = Field(default=16, ge=1, le=1024)
    """Vectors that `method: prompt` puts before each conversation; 1 to 1024."""

    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak learning rate; up to 1. About ten times what full fine-tuning of the same model would use."""

    lora_plus: float = Field(default=1.0, ge=1, le=256)
    """B's learning rate as a multiple of A's (LoRA+, arXiv:2402.12354); 1 to 256. 16 is its authors' advice, with a
    lower `learning_rate`; 1 is plain LoRA."""

    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the rate falls after the warm-up."""

    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises from zero; 0 to below 1."""

    epochs: float | None = Field(default=None, gt=0, le=1000)
    """Passes over the training set; up to 1000. Give this or `max_steps`."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, at least 1, whatever the size of the training set. Give this or `epochs`."""

    batch_size: int = Field(default=8, ge=1, le=4096)
    """Packed blocks that go through the model at once; 1 to 4096. Memory grows in proportion. With preferences: rows,
    each with both of its answers, so twice as many sequences."""

    accumulation: int = Field(default=1, ge=1, le=4096)
    """Batches whose gradients are summed for one step; 1 to 4096. Like a larger batch, without its memory."""

    processes: int = Field(default=1, ge=1, le=1024)
    """Processes that train together on this machine, one for each GPU: a step takes batch_size x accumulation blocks in
    each of them. Every one holds the whole base, unless `sharding` says otherwise."""

    sharding: Literal["none", "full"] = "none"
    """`full`: each of the processes holds a part of base, adapter, gradients and optimizer (FSDP2), for a base that does
    not fit one card. On 4 or 16 bits, with AdamW of torch and an adapter of A and B alone."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's decoupled decay of A and B; 0 to 1."""

    beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's decay of the squared gradients' mean; above 0, below 1. 0.99 adapts faster, for runs of few steps."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm, over all parameters together, where they exceed it."""

    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "lion_8bit",
        "paged_lion_8bit",
    ] = "adamw_torch"
    """The 8-bit ones quarter the optimizer's state, the paged ones move it to the CPU when a GPU is full; Lion keeps one
    moment instead of two and wants a third to a tenth of AdamW's rate (arXiv:2302.06675)."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time for a fraction of the memory."""

    kernels: Literal["plain", "fused"] = "plain"
    """`plain`: PEFT's and transformers' own operations. `fused`: fewer and larger ones where model and machine allow
    (see `regraft.train.kernels`): the same sums in another order, so other bytes."""

    logits_chunk: int | None = Field(default=None, ge=16, le=65536)
    """Trained tokens whose logits are held at once, 16 to 65,536; they are made again in the backward pass. Null holds a
    whole batch's (with `kernels: fused` on a GPU, those of 1,024). Large vocabularies on small cards want 256: 12 bytes
    for each token and word. Not for `method: prompt`, nor for models that cap or scale their logits."""

    compile: bool = False
    """Compile each transformer block with torch.compile: a minute or more at the start, then faster steps. Needs a C++
    compiler; equal bytes need the same one. Only for `method: lora`."""

    validation_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the blocks that is not trained on, to measure a held-out loss while training; 0 to 0.5. They are taken
    from the training side: the holdout stays unseen."""

    validate_every: int = Field(default=50, ge=1)
    """Steps between measurements of the held-out loss, at least 1; the last step always gets one."""

    keep: Literal["last", "best"] = "last"
    """Which step's adapter is the result: the last one's, or that of the lowest held-out loss."""

    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many measurements of the held-out loss in a row without a new lowest one; null never does."""

    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints, at least 1: what a kill can cost. The last step always gets one."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints to keep, at least 1; with 2 a damaged newest one costs only the steps since the other."""

    logging_every: int = Field(default=5, ge=1)
    """Steps between lines of `metrics.jsonl`, at least 1; a line's loss is the mean since the line before."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of torch; null leaves its choice. Sums depend on it, so equal bytes need an equal number."""

    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the adapter is saved in; it is always trained in fp32, since bf16 loses small updates."""

    @model_validator(mode="after")
    def _check(self) -> "TrainParams":
        problems = []
        if (self.epochs is None) == (self.max_steps is None):
            problems.append("exactly one of `epochs` and `max_steps`")
        if self.validation_share == 0 and (self.keep == "best" or self.early_stopping is not None):
            problems.append(
                "a `validation_share` above 0 for `keep: best` or `early_stopping`: they need a held-out loss"
            )
        if (self.parent is None) != (self.parent_digest is None):
            problems.append("both `parent` and `parent_digest`, or neither")
        if self.parent is not None and self.init != "default":
            problems.append(f"`init: default` with a `parent`: it gives A and B, and so would `{self.init}`")
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            problems.append("even ranks for `init: orthogonal`")
        if self.dora and self.init in ("pissa", "olora", "loftq"):
            problems.append(f"`dora: false` with `init: {self.init}`: its first norm would be of another base")
        if self.method != "lora":
            problems += [f"`method: lora` for `{name}`" for name in _LORA_ONLY if getattr(self, name) != _default(name)]
        problems += _sharded(self)
        if self.method == "prompt" and self.logits_chunk is not None:
            problems.append("`logits_chunk: null` for `method: prompt`")
        problems += _of_objective(self) + _patterns(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _sharded(params: TrainParams) -> list[str]:
    """Say what `sharding: full` has not been tried with."""
    if params.sharding == "none":
        return []
    plain = {"method": "lora", "kernels": "plain", "compile": False, "dora": False}
    plain |= {"modules_to_save": [], "trainable_tokens": []}
    problems = [
        f"`{name}: {value}` for `sharding: full`" for name, value in plain.items() if getattr(params, name) != value
    ]
    if params.processes == 1:
        problems.append("`processes` above 1 for `sharding: full`")
    if params.init not in ("default", "gaussian", "orthogonal"):
        problems.append(f"`init: default`, `gaussian` or `orthogonal` for `sharding: full`, not `{params.init}`")
    if params.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        problems.append(
            f"`optimizer: adamw_torch` or `adamw_torch_fused` for `sharding: full`, not `{params.optimizer}`"
        )
    return problems


_LORA_ONLY = (
    "dora",
    "rslora",
    "init",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_tokens",
    "lora_plus",
    "parent",
    "kernels",
    "compile",
)


def _default(name: str) -> object:
    return TrainParams.model_fields[name].get_default(call_default_factory=True)


_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def _of_objective(params: TrainParams) -> list[str]:
    """Say what does not go with the objective."""
    own, objective = params.preference, params.objective
    if objective == "supervised":
        return ["an `objective` of dpo, orpo or kto for `preference`"] if own != PreferenceParams() else []
    problems = []
    if params.method != "lora":
        problems.append(f"`method: lora` for `objective: {objective}`: the reference is the base without the adapter")
    if params.dropout:
        problems.append(f"`dropout: 0` for `objective: {objective}`: rewards would be differences of noise")
    if params.compile:
        problems.append(f"`compile: false` for `objective: {objective}`: its forward passes are not whole blocks'")
    if params.sharding != "none":
        problems.append(f"`sharding: none` for `objective: {objective}`: its reference is the same base")
    if params.logits_chunk is not None:
        problems.append(f"`logits_chunk: null` for `objective: {objective}`: TRL has chunks of its own")
    known = {"dpo": get_args(PairLoss), "kto": get_args(UnpairedLoss), "orpo": ()}[objective]
    if own.loss is not None and own.loss not in known:
        problems.append(f"`preference.loss` of {', '.join(known) or 'null'} for `objective: {objective}`")
    if own.label_smoothing and (objective != "dpo" or own.loss not in _SMOOTHED):
        problems.append(f"`preference.loss` of {', '.join(_SMOOTHED)} for `preference.label_smoothing`")
    if own.loss == "exo_pair" and not own.label_smoothing:
        problems.append("a `preference.label_smoothing` above 0 for `exo_pair`, such as 0.001")
    if objective != "kto" and (own.desirable_weight, own.undesirable_weight) != (1, 1):
        problems.append("`objective: kto` for `preference.desirable_weight` and `preference.undesirable_weight`")
    if objective == "kto" and params.batch_size < 2:
        problems.append("a `batch_size` of at least 2 for `objective: kto`: answers of other rows estimate its KL")
    return problems


def _patterns(params: TrainParams) -> list[str]:
    """Say which regular expressions are none."""
    named = [("rank_pattern", key) for key in params.rank_pattern]
    named += [("alpha_pattern", key) for key in params.alpha_pattern]
    if isinstance(params.target_modules, str) and params.target_modules not in PRESETS:
        named.append(("target_modules", params.target_modules))
    problems = []
    for field, pattern in named:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"a regular expression in `{field}`, {pattern!r} is none ({error})")
    return problems
