"""What training measured; the training gate decides from it."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from regraft.late import LateFields
from regraft.report import Report


class AdaptedModule(BaseModel):
    """One linear layer that carries an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    """The module's path in the base model, e.g. `model.layers.0.self_attn.q_proj`."""
    rank: int
    a_norm: float
    """Frobenius norm of A (rank x in); its initial value is random and not zero. -1 where it is not finite."""
    b_norm: float
    """Frobenius norm of B (out x rank), zero before training. -1 where it is not finite."""


class PreferenceResult(BaseModel):
    """What a training on preferences did to the rewards of its own rows; see `regraft.train.preference`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    objective: str
    """`dpo`, `orpo` or `kto`."""
    beta: float
    loss: str
    """The loss of that family."""
    reference: str | None
    """What rewards are measured against: `base`, `start` (of pissa and olora: the base), the parent's digest; null for
    orpo, whose reward is the mean log likelihood of an answer's token."""
    margin_first: float | None
    """Mean reward of the preferred answers minus that of the others over the first tenth of the steps; times beta. Null
    where none was measured: kto measures it in batches with answers of both kinds."""
    margin_last: float | None
    """The same over the last tenth."""
    accuracy_first: float | None
    """Share of the pairs whose preferred answer has the higher reward; null for kto, whose answers come singly."""
    accuracy_last: float | None


class TrainReport(LateFields, Report):
    """How one adapter came to be, and the facts about it; equal inputs give equal bytes on a CPU."""

    LATE: ClassVar[frozenset[str]] = frozenset({"preference"})

    base: str
    """Name of the base model, as in `adapter_config.json`."""
    base_digest: str
    tokenizer_digest: str
    dataset_digest: str
    """`train_digest` of the preprocess report."""
    params_digest: str
    """Digest of the sections `train`, `model.quantization` and `model.attention`."""
    adapter_digest: str
    """Digest of {file: sha256} of the adapter's folder."""
    seed: int
    method: str = "lora"
    """`lora`, or a yardstick that no gate lets through: `full`, `prompt`."""
    parent: str | None = None
    """Digest of the adapter that it went on from."""

    planned_steps: int
    """Optimizer steps that epochs or `max_steps` ask for; those done where early stopping ended the run."""
    steps: int
    """Optimizer steps done; less than planned would mean a broken run."""
    preference: PreferenceResult | None = None
    """For the objectives dpo, orpo and kto; else left out."""
    blocks: int
    """Packed blocks of the training set; with preferences its rows."""
    tokens_seen: int
    """Tokens that went through the model, padding not counted, over all steps."""
    tokens_trained: int
    """Tokens that carried a loss, over all steps."""

    loss_first: float
    """Mean of the loss for each trained token (with preferences: for each pair or answer) over the first tenth of the steps (at least one)."""
    loss_last: float
    """The same over the last tenth."""
    loss_decreased: bool
    """`loss_last` < `loss_first`."""
    all_finite: bool
    """Every loss and gradient norm, taken raw at every step, and every trained parameter was finite."""
    non_finite_steps: list[int]
    """Steps whose raw loss or gradient norm was not finite; training stops at the first, so a report has none."""
    non_finite_parameters: list[str]
    """Adapter tensors that hold a value that is not finite."""
    grad_norm_largest: float
    """Largest gradient norm before clipping."""
    held_out: list[tuple[int, float]] = Field(default_factory=list)
    """Step and held-out loss of each measurement; empty without a `validation_share`."""
    kept_step: int | None = None
    """The step whose adapter this is; null is the last one."""
    stopped_early: bool = False
    """The held-out loss had not fallen for as long as `early_stopping` allows."""

    adapted_modules: list[AdaptedModule]
    """Every layer that carries an adapter, by name."""
    expected_modules: list[str]
    """Every layer that `target_modules` asks for, found by walking the base, not by asking PEFT."""
    bare_weights: list[str] = Field(default_factory=list)
    """Matrices of the base that are in no linear layer, such as fused experts: not quantised, not adapted."""
    unquantized_modules: list[str] = Field(default_factory=list)
    """Linear layers that are held as floats on a quantised base: the output layer and `skip_modules`."""
    trained_whole: list[str] = Field(default_factory=list)
    """Tensors beside A and B: modules saved whole, trained tokens, DoRA's magnitudes."""
    missing_modules: list[str]
    """Expected layers that carry no adapter."""
    zero_b: list[str]
    """Adapted layers whose B is zero everywhere: they change nothing."""
    trainable_parameters: int
    total_parameters: int
    """Parameters of the base, as stored."""
