"""The model that is trained: the frozen base with what `method` trains on it, in fp32."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DamagedArtifact, ParamsError
from regraft.model.adapter import (
    CONFIG,
    WEIGHTS,
    adapter_bytes,
    adapter_config,
    adapter_digest,
    adapter_parameters,
    attach,
    check_adapter,
    linear_modules,
    load_parameters,
    lora_layers,
    matches,
)
from regraft.model.load import (
    Base,
    device,
    load_model,
    load_tokenizer,
    prepare_for_adapters,
    quiet_libraries,
    refuse_spread,
)
from regraft.model.params import ModelParams
from regraft.train.data import Blocks, batches, moved
from regraft.train.pairs import parent_needed
from regraft.train.params import TrainParams
from regraft.train.start import Start, follow_inputs, remove_start, repair_quantization, take_start
from regraft.train.targets import bare_weights, check_adapted, expected_modules, peft_targets, unquantized_layers

if TYPE_CHECKING:
    from torch import nn

START = "start.safetensors"
"""Checkpoints hold it where the start was taken out of the base."""


@dataclass(frozen=True)
class Trainee:
    """A model and what of it is trained."""

    model: Any
    """A `PeftModel`; for `method: full` the base itself."""
    parameters: "dict[str, nn.Parameter]"
    """All that is trained, by the key that its file gives it."""
    method: str
    expected: list[str]
    """Layers that `target_modules` asks for."""
    bare: list[str]
    """Matrices of the base that are in no linear layer: neither quantised nor adapted."""
    unquantized: list[str]
    """Linear layers held as floats although `bits` is 4 or 8."""
    start: Start
    prompt_tokens: int = 0

    def save(self, folder: Path, *, base_name: str, dtype: str) -> str:
        """Write what was trained and return its digest; equal values give equal bytes.

        An adapter for the untouched base; for `full` the whole model, for `prompt` its vectors, in PEFT's formats.
        """
        if self.method == "lora" and self.start.tensors:
            self.start.save(self.model, folder, base_name=base_name, dtype=dtype)
            return adapter_digest(folder)
        if self.method == "lora":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_bytes(adapter_config(self.model, base_name))
            (folder / WEIGHTS).write_bytes(adapter_bytes(self.parameters, dtype))
            return adapter_digest(folder)
        from regraft.artifacts import digest_file, digest_json

        self.model.save_pretrained(folder)
        return digest_json({path.name: digest_file(path) for path in sorted(folder.iterdir())})


def make_trainee(params: TrainParams, model: ModelParams, base: Base, blocks: Blocks, resumed: Path | None) -> Trainee:
    """Load the base, freeze it, and put on it what is to be trained.

    Args:
        params: how to train.
        model: how to hold the base.
        base: from `open_base`.
        blocks: the training set, for `init: eva`.
        resumed: a checkpoint whose values will be loaded: a costly start is then not computed.

    Raises:
        ParamsError: settings that this base, or its quantisation, cannot have.
        DamagedArtifact: the parent adapter is not the one that was meant.
    """
    quiet_libraries()
    import torch
    from transformers import set_seed

    bits = model.quantization.bits
    _check(params, bits, base)
    # A prompt makes documents longer than their positions say, which only a mask can follow.
    # Preferences are padded, not packed.
    packed = params.method != "prompt" and params.objective == "supervised"
    attention = model.attention if packed or model.attention == "eager" else "sdpa"
    sharded = {"sharded": True} if params.sharding == "full" else {}
    loaded = load_model(base, model.quantization, training=True, attention=attention, **sharded)
    refuse_spread(loaded)
    prepare_for_adapters(loaded, model.quantization)
    set_seed(params.seed)
    if params.method != "lora":
        return _yardstick(params, loaded)
    expected = expected_modules(loaded, params.target_modules)
    bare, unquantized = bare_weights(loaded), unquantized_layers(loaded) if bits < 16 else []
    peft_model = attach(loaded, _lora_config(params, loaded, base, expected))
    check_adapted(expected, list(lora_layers(peft_model)), loaded)
    parameters = adapter_parameters(peft_model)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
    for parameter in trainable:
        parameter.data = parameter.data.to(torch.float32)
    start = _begin(params, peft_model, base, blocks, resumed)
    if parent_needed(params, resumed):
        _go_on_from(params, parameters, {name: linear_modules(loaded)[name] for name in expected})
    if params.kernels == "fused":
        from regraft.train.kernels import use_fused_kernels

        use_fused_kernels(peft_model)
    if params.compile:
        from regraft.train.kernels import compile_blocks

        compile_blocks(peft_model)
    return Trainee(peft_model, parameters, "lora", expected, bare, unquantized, start)


def _check(params: TrainParams, bits: int, base: Base | None) -> None:
    problems = []
    if params.sharding == "full" and (bits == 8 or (base is not None and base.new_tokens)):
        found = "model.quantization.bits 8" if bits == 8 else "model.new_tokens"
        problems.append(f"train.sharding: found full with {found}, expected it without")
    if params.init in ("pissa", "olora") and bits < 16:
        problems.append(
            f"train.init: found {params.init}, which changes the base, and a {bits}-bit one can't be changed back; "
            "expected `loftq` (4 bits), `eva`, or model.quantization.bits 16"
        )
    if params.init == "loftq" and bits != 4:
        problems.append(f"train.init: found loftq, expected it only with model.quantization.bits 4, found {bits}")
    if params.method == "full" and bits != 32:
        problems.append(
            f"train.method: found full, expected it only with model.quantization.bits 32, found {bits}: "
            "16-bit weights lose small updates"
        )
    if problems:
        raise ParamsError("; ".join(problems), fix="edit params.yaml")


def _lora_config(params: TrainParams, loaded: Any, base: Base, expected: list[str]) -> Any:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    conv = [isinstance(loaded.get_submodule(name), Conv1D) for name in expected]
    extra: dict[str, Any] = {}
    if params.modules_to_save:
        modules = {name: module for name, module in loaded.named_modules() if matches(name, params.modules_to_save)}
        unknown = [target for target in params.modules_to_save if not any(matches(n, [target]) for n in modules)]
        if unknown:
            raise ParamsError(f"train.modules_to_save: {', '.join(unknown)} names no module", fix="edit params.yaml")
        extra["modules_to_save"] = sorted(modules)  # whole paths: PEFT would take `norm` for `input_layernorm` as well
        embeddings = (loaded.get_input_embeddings(), loaded.get_output_embeddings())
        tied = loaded.config.get_text_config().tie_word_embeddings
        extra["ensure_weight_tying"] = tied and any(m is e for m in modules.values() for e in embeddings)
    new = {} if base is None else base.new_tokens
    if params.trainable_tokens or new:
        extra["trainable_token_indices"] = _token_rows(params, loaded, base, sorted(new.values()))
    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        use_rslora=params.rslora,
        use_dora=params.dora,
        rank_pattern=dict(params.rank_pattern),
        alpha_pattern=dict(params.alpha_pattern),
        init_lora_weights=params.init if params.init in ("gaussian", "orthogonal") else True,
        fan_in_fan_out=bool(conv) and all(conv),
        target_modules=peft_targets(loaded, expected),
        task_type="CAUSAL_LM",
        **extra,
    )


def _token_rows(params: TrainParams, loaded: Any, base: Base, new: list[int]) -> list[int] | dict[str, list[int]]:
    """Rows of embeddings to train: of tied ones the input's; else new tokens are trained at both ends.

    What the output layer never learnt to say, a trained input alone cannot make it say.
    """
    ids = sorted({*(_token_ids(params.trainable_tokens, base) if params.trainable_tokens else []), *new})
    ends = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    if not new or ends[1] is None or ends[0].weight is ends[1].weight:
        return ids
    names = [next(name for name, module in loaded.named_modules() if module is end) for end in ends]
    return {names[0]: ids, names[1]: new}


def _token_ids(tokens: list[str], base: Base) -> list[int]:
    tokenizer = load_tokenizer(base)
    known = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in known]
    if unknown:
        raise ParamsError(
            f"train.trainable_tokens: {', '.join(map(repr, unknown))} is no token of this base's tokenizer; "
            f"its added tokens: {', '.join(sorted(tokenizer.get_added_vocab())) or 'none'}",
            fix="name tokens that it has; to add new ones, name them in model.new_tokens",
        )
    return sorted({known[token] for token in tokens})


def _begin(params: TrainParams, peft_model: Any, base: Base, blocks: Blocks, resumed: Path | None) -> Start:
    if params.init in ("pissa", "olora"):
        if resumed is None:
            return take_start(peft_model, params.init)
        from safetensors.torch import load_file

        start = Start(load_file(resumed / START))
        remove_start(peft_model, start)
        return start
    if resumed is None and params.init == "loftq":
        repair_quantization(peft_model, base.folder)
    if resumed is None and params.init == "eva":
        to_device = partial(moved, device=device())
        follow_inputs(peft_model, map(to_device, batches(blocks.rows, params.batch_size, pad_id=0)))
    return Start({})


def _go_on_from(
    params: TrainParams, parameters: "dict[str, nn.Parameter]", modules: dict[str, tuple[int, int]]
) -> None:
    assert params.parent is not None
    parent = check_adapter(Path(params.parent), modules=modules)
    if parent.digest != params.parent_digest:
        raise DamagedArtifact(
            f"the parent adapter {params.parent} has the digest {parent.digest}, expected {params.parent_digest}",
            fix="regraft parent, or set train.parent and train.parent_digest to null",
        )
    same = {"rank": (parent.rank, params.rank), "alpha": (parent.alpha, params.alpha)}
    same |= {"rslora": (parent.rslora, params.rslora), "dora": (parent.dora, params.dora)}
    problems = [f"train.{key}: found {own}, the parent has {its}" for key, (its, own) in same.items() if its != own]
    if problems:
        raise ParamsError("; ".join(problems), fix="train like the parent, or set train.parent to null")
    load_parameters(parameters, Path(params.parent) / WEIGHTS)


def _yardstick(params: TrainParams, loaded: Any) -> Trainee:
    """Full fine-tuning, or prompt tuning that begins at the embeddings of random tokens."""
    import torch

    if params.method == "full":
        loaded.requires_grad_(True)
        return Trainee(loaded, dict(sorted(loaded.named_parameters())), "full", [], [], [], Start({}))
    from peft import PromptTuningConfig, PromptTuningInit, TaskType

    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=params.prompt_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    peft_model = attach(loaded, config)
    parameters = {key: p for key, p in sorted(peft_model.named_parameters()) if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.float32)
    return Trainee(peft_model, parameters, "prompt", [], [], [], Start({}), params.prompt_tokens)
