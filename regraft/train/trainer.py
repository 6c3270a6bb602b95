"""The stage `train`: from a pinned base and packed blocks to an adapter, resumable to the same bytes."""

import importlib.metadata
import logging
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, digest_file, digest_json, write_json
from regraft.errors import ParamsError, Preempted, RegraftError
from regraft.failpoints import failpoint
from regraft.model.adapter import adapter_parameters, attach, linear_modules, load_weights, matches, save_adapter
from regraft.model.load import Base, compute_dtype, device, load_model, load_tokenizer, open_base, quiet_libraries
from regraft.model.params import ModelParams
from regraft.train.checkpoint import Checkpoints
from regraft.train.data import Blocks, collate, open_blocks
from regraft.train.machine import explained, measured, reproducible
from regraft.train.params import TrainParams
from regraft.train.report import AdaptedModule, TrainReport
from regraft.train.stop import StopRequest

if TYPE_CHECKING:
    from peft import PeftModel

    from regraft.train.loop import Progress

log = logging.getLogger("regraft.train")
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def train(
    params: TrainParams,
    model: ModelParams,
    *,
    base: Path,
    dataset: Path,
    out: Path,
    checkpoints: Path,
    measurements: Path | None = None,
) -> TrainReport:
    """Train a LoRA adapter on the frozen base, going on from the newest whole checkpoint of the same inputs.

    Args:
        params: how to train.
        model: only `quantization` and `attention` matter; the base is the pinned one.
        base: output of the stage `model`.
        dataset: output of the stage `preprocess`.
        out: gets `adapter/`, `metrics.jsonl` and `report.json`.
        checkpoints: the folder of all checkpoints; see `regraft.train.checkpoint`.
        measurements: gets times, speed and memory, as JSON.

    Raises:
        ParamsError: `target_modules` names no layer.
        PinMismatch, DamagedArtifact, MissingInput: the inputs are not what they should be.
        ResumeRefused: the checkpoint folder belongs to other inputs.
        TrainingDiverged: a loss or gradient was not finite; earlier checkpoints stay.
        Preempted: SIGTERM or SIGINT came; a checkpoint of the last step was written.
        Busy: another process trains from the same inputs.
        RegraftError: out of memory, or the disk is full; the message names the setting to change.
    """
    started = time.monotonic()
    stop = StopRequest()
    with stop.listening(), explained(params, model), reproducible(params):
        opened = open_base(base)
        blocks = open_blocks(dataset)
        store = Checkpoints(checkpoints, _inputs(params, model, opened, blocks))
        with store.opened():
            resumed = store.newest()
            store.rewind_metrics(resumed)
            peft_model, expected = _adapted(params, model, opened)
            begun = time.monotonic()
            progress, new = _train(params, model, opened, blocks, store, resumed, peft_model, stop)
            trained = time.monotonic()
            failpoint("train.finish")
            with commit_dir(out) as folder:
                digest = save_adapter(peft_model, folder / "adapter", base_name=opened.name, dtype=params.adapter_dtype)
                (folder / "metrics.jsonl").write_bytes(store.metrics.read_bytes())
                report = _report(params, model, opened, blocks, progress, peft_model, expected, digest)
                report.save(folder / "report.json")
            failpoint("train.saved")
            store.prune(params.keep_checkpoints)
            store.finish()
        if measurements is not None:
            write_json(measurements, measured(new, started, begun, trained, resumed))
    return report


def planned_steps(params: TrainParams, blocks: int) -> int:
    """Optimizer steps that the parameters ask for, on so many blocks; an incomplete last batch counts."""
    if params.max_steps is not None:
        return params.max_steps
    assert params.epochs is not None
    return math.ceil(params.epochs * math.ceil(math.ceil(blocks / params.batch_size) / params.accumulation))


def expected_modules(model: Any, targets: str | list[str]) -> list[str]:
    """Name every layer that is to carry an adapter, by walking the base model.

    Raises:
        ParamsError: a target names no linear layer.
    """
    layers = list(linear_modules(model))
    if isinstance(targets, list):
        unknown = [target for target in targets if not any(matches(name, [target]) for name in layers)]
        if unknown:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ParamsError(
                f"train.target_modules: {', '.join(unknown)} names no linear layer; this base has {', '.join(known)}",
                fix="edit params.yaml",
            )
        return sorted(name for name in layers if matches(name, targets))
    output = model.get_output_embeddings()
    return sorted(name for name in layers if model.get_submodule(name) is not output)


def _adapted(params: TrainParams, model: ModelParams, base: Base) -> tuple["PeftModel", list[str]]:
    """Load the base, freeze it, and put a fresh adapter in fp32 on it."""
    quiet_libraries()
    import torch
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import set_seed

    loaded = load_model(base, model.quantization, training=True, attention=model.attention)
    if model.quantization.bits < 16:
        # Checkpointing of activations is the Trainer's. A 16-bit base would be copied to fp32 here: it stays as it is.
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    expected = expected_modules(loaded, params.target_modules)
    last_names = sorted({name.rpartition(".")[2] for name in expected})
    selected = [name for name in linear_modules(loaded) if matches(name, last_names)]
    set_seed(params.seed)
    peft_model = attach(
        loaded,
        LoraConfig(
            r=params.rank,
            lora_alpha=params.alpha,
            lora_dropout=params.dropout,
            target_modules=last_names if sorted(selected) == expected else expected,
            task_type="CAUSAL_LM",
        ),
    )
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter_parameters(peft_model).values()}
    for parameter in trainable:
        parameter.data = parameter.data.to(torch.float32)
    return peft_model, expected


def _train(
    params: TrainParams,
    model: ModelParams,
    base: Base,
    blocks: Blocks,
    store: Checkpoints,
    resumed: Path | None,
    peft_model: "PeftModel",
    stop: StopRequest,
) -> tuple["Progress", dict[str, int]]:
    """Run the steps that are left and return the progress, with what this process did of it."""
    from regraft.train.loop import ADAPTER, AdapterTrainer, Progress, Recorder

    steps = planned_steps(params, len(blocks.rows))
    progress = Progress() if resumed is None else Progress.load(resumed)
    before = {"steps": len(progress.losses), "seen": progress.seen, "computed": progress.computed}
    if resumed is not None:
        log.info("going on from %s", resumed)
    if resumed is not None and len(progress.losses) >= steps:
        load_weights(peft_model, resumed / ADAPTER)
    else:
        tokenizer = load_tokenizer(base)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        recorder = Recorder(params, store, stop, progress)
        with tempfile.TemporaryDirectory(prefix="regraft-trainer-") as scratch:
            trainer = AdapterTrainer(
                peft_model,
                _arguments(params, model, Path(scratch)),
                partial(collate, pad_id=pad_id),
                blocks.rows,
                callbacks=[recorder],
                progress=progress,
            )
            recorder.trainer = trainer
            if stop.requested:
                raise Preempted(f"stopped by {stop.requested} before the first step", fix="run the same command again")
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if trainer.state.global_step != steps:
            raise RegraftError(f"training ended after {trainer.state.global_step} of {steps} steps")
    return progress, {
        "steps": len(progress.losses) - before["steps"],
        "seen": progress.seen - before["seen"],
        "computed": progress.computed - before["computed"],
    }


def _arguments(params: TrainParams, model: ModelParams, scratch: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    dtype, on_gpu = compute_dtype(model.quantization), device().type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        seed=params.seed,
        data_seed=params.seed,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.scheduler,
        warmup_steps=params.warmup,
        num_train_epochs=params.epochs if params.epochs is not None else 1,
        max_steps=params.max_steps if params.max_steps is not None else -1,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=params.accumulation,
        weight_decay=params.weight_decay,
        adam_beta2=params.beta2,
        max_grad_norm=params.max_grad_norm,
        optim=params.optimizer,
        activation_checkpointing=params.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if params.gradient_checkpointing else None,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    # One process computes on one GPU: where the Trainer sees several, DataParallel would copy the quantised base.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _inputs(params: TrainParams, model: ModelParams, base: Base, blocks: Blocks) -> dict[str, Any]:
    """Everything that the adapter's bytes depend on."""
    import torch

    package = Path(__file__).parent.parent
    code = {
        path.relative_to(package).as_posix(): digest_file(path)
        for part in ("model", "train")
        for path in sorted((package / part).glob("*.py"))
    }
    return {
        **_sections(params, model),
        "base": base.report.digest,
        "tokenizer": base.report.tokenizer_digest,
        "data": blocks.digest,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "code": code,
        "device": device().type,
        "threads": torch.get_num_threads(),
    }


def _sections(params: TrainParams, model: ModelParams) -> dict[str, Any]:
    quantization = model.quantization.model_dump(mode="json")
    return {
        "train": params.model_dump(mode="json"),
        "model": {"quantization": quantization, "attention": model.attention},
    }


def _report(
    params: TrainParams,
    model: ModelParams,
    base: Base,
    blocks: Blocks,
    progress: "Progress",
    peft_model: "PeftModel",
    expected: list[str],
    digest: str,
) -> TrainReport:
    parameters = adapter_parameters(peft_model)
    norms = {key: float(parameter.detach().norm()) for key, parameter in parameters.items()}
    broken = [key for key, parameter in parameters.items() if not bool(parameter.isfinite().all())]
    modules = [
        AdaptedModule(
            name=key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),
            rank=parameter.shape[0],
            a_norm=_finite_or(norms[key]),
            b_norm=_finite_or(norms[key.replace(".lora_A.", ".lora_B.")]),
        )
        for key, parameter in parameters.items()
        if key.endswith(".lora_A.weight")
    ]
    steps = len(progress.losses)
    tenth = max(1, steps // 10)
    first, last = progress.mean(0, tenth), progress.mean(steps - tenth, steps)
    return TrainReport(
        base=base.name,
        base_digest=base.report.digest,
        tokenizer_digest=base.report.tokenizer_digest,
        dataset_digest=blocks.digest,
        params_digest=digest_json(_sections(params, model)),
        adapter_digest=digest,
        seed=params.seed,
        planned_steps=planned_steps(params, len(blocks.rows)),
        steps=steps,
        blocks=len(blocks.rows),
        tokens_seen=progress.seen,
        tokens_trained=sum(progress.trained),
        loss_first=first,
        loss_last=last,
        loss_decreased=last < first,
        all_finite=not broken and all(math.isfinite(loss) for loss in progress.losses),
        non_finite_steps=[step for step, loss in enumerate(progress.losses, 1) if not math.isfinite(loss)],
        non_finite_parameters=broken,
        grad_norm_largest=progress.grad_norm_largest,
        adapted_modules=modules,
        expected_modules=expected,
        missing_modules=sorted(set(expected) - {module.name for module in modules}),
        zero_b=[module.name for module in modules if module.b_norm == 0],
        trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
        total_parameters=base.report.parameters,
    )


def _finite_or(value: float, otherwise: float = -1.0) -> float:
    return value if math.isfinite(value) else otherwise
