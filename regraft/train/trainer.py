"""The stage `train`: from a pinned base and packed blocks to an adapter, resumable to the same bytes."""

import importlib.metadata
import logging
import math
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, digest_file, digest_json, write_json
from regraft.errors import ParamsError, Preempted, RegraftError
from regraft.failpoints import failpoint
from regraft.model.adapter import load_parameters
from regraft.model.check import TOKENIZER
from regraft.model.load import Base, compute_dtype, device, load_tokenizer, open_base
from regraft.model.params import ModelParams
from regraft.train import crew
from regraft.train.adapt import Trainee, make_trainee
from regraft.train.checkpoint import Checkpoints
from regraft.train.data import Blocks, as_arrays, collate, open_blocks, split
from regraft.train.kernels import own_kernels
from regraft.train.machine import explained, measured, reproducible
from regraft.train.pairs import check_installed, open_pairs, reference_of
from regraft.train.params import TrainParams
from regraft.train.report import AdaptedModule, PreferenceResult, TrainReport
from regraft.train.shard import fsdp_arguments, gathered
from regraft.train.speed import Speed, flops_per_token
from regraft.train.stop import StopRequest

if TYPE_CHECKING:
    from regraft.train.loop import Progress

log = logging.getLogger("regraft.train")
FOLDERS = {"lora": "adapter", "full": "model", "prompt": "prompt"}
"""Where in the stage's output a method's weights lie."""
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
    """Train an adapter (or a yardstick) on the base, going on from the newest whole checkpoint of the same inputs.

    Args:
        params: how to train.
        model: only `quantization` and `attention` matter; the base is the pinned one.
        base: output of the stage `model`.
        dataset: output of the stage `preprocess`.
        out: gets `adapter/` (`model/` or `prompt/` for a yardstick), `metrics.jsonl` and `report.json`.
        checkpoints: the folder of all checkpoints; see `regraft.train.checkpoint`.
        measurements: gets times, speed and memory, as JSON.

    Raises:
        ParamsError: `target_modules` names no layer.
        DataError: the data has no preferences, or not those that the objective needs.
        PinMismatch, DamagedArtifact, MissingInput: the inputs are not what they should be.
        ResumeRefused: the checkpoint folder belongs to other inputs.
        TrainingDiverged: a loss or gradient was not finite; earlier checkpoints stay.
        Preempted: SIGTERM or SIGINT came; a checkpoint of the last step was written.
        Busy: another process trains from the same inputs.
        RegraftError: out of memory, or the disk is full; the message names the setting to change.
    """
    started = time.monotonic()
    stop = StopRequest()
    with stop.listening(), explained(params, model), reproducible(params), own_kernels():
        if params.objective != "supervised":
            check_installed(params.objective)
        opened = open_base(base)
        conversations = open_blocks(dataset)
        blocks = conversations if params.objective == "supervised" else open_pairs(dataset, params.objective)
        crew.join()
        store = Checkpoints(checkpoints, _inputs(params, model, opened, blocks))
        with store.opened() if crew.is_first() else nullcontext():
            resumed = crew.told_by_first(store.newest() if crew.is_first() else None)
            if crew.is_first():
                store.rewind_metrics(resumed)
            trainee = make_trainee(params, model, opened, conversations, resumed)
            count = sum(parameter.numel() for parameter in trainee.parameters.values())
            speed = Speed(flops_per_token(trainee.model, count, full=params.method == "full"))
            begun = time.monotonic()
            progress, new = _train(params, model, opened, blocks, store, resumed, trainee, stop, speed)
            trained = time.monotonic()
            if params.sharding == "full":
                for key, tensor in gathered(trainee.parameters).items():
                    trainee.parameters[key] = tensor  # type: ignore[assignment]  # the model is of no more use
            failpoint("train.finish")
            if not crew.is_first():
                report: TrainReport = crew.told_by_first(None)
                crew.leave()
                return report
            with commit_dir(out) as folder:
                digest = trainee.save(
                    folder / FOLDERS[params.method], base_name=opened.name, dtype=params.adapter_dtype
                )
                if opened.extended is not None and params.method == "lora":
                    _copy_tokenizer(opened.extended, folder / FOLDERS["lora"])
                (folder / "metrics.jsonl").write_bytes(store.metrics.read_bytes())
                report = _report(params, model, opened, blocks, progress, trainee, digest)
                report.save(folder / "report.json")
            failpoint("train.saved")
            store.prune(params.keep_checkpoints)
            store.finish()
        crew.told_by_first(report)
        crew.leave()
        if measurements is not None:
            write_json(measurements, measured(new, started, begun, trained, resumed, speed))
    return report


def _copy_tokenizer(extended: Path, adapter: Path) -> None:
    """Put an extended tokenizer beside an adapter: its new tokens are of no use without."""
    for name in TOKENIZER:
        if (extended / name).is_file():
            shutil.copyfile(extended / name, adapter / name)


def planned_steps(params: TrainParams, blocks: int) -> int:
    """Optimizer steps that the parameters ask for, on so many blocks; an incomplete last batch counts."""
    if params.max_steps is not None:
        return params.max_steps
    assert params.epochs is not None
    batches = math.ceil(math.ceil(blocks / params.batch_size) / params.processes)
    return math.ceil(params.epochs * math.ceil(batches / params.accumulation))


def _train(
    params: TrainParams,
    model: ModelParams,
    base: Base,
    blocks: Blocks,
    store: Checkpoints,
    resumed: Path | None,
    trainee: Trainee,
    stop: StopRequest,
    speed: Speed,
) -> tuple["Progress", dict[str, int]]:
    """Run the steps that are left and return the progress, with what this process did of it."""
    from regraft.train.loop import ADAPTER, BEST, AdapterTrainer, Progress, Recorder

    rows, held_out = split(blocks.rows, params.validation_share)
    _check_blocks(params, rows)
    steps = planned_steps(params, len(rows))
    progress = Progress() if resumed is None else Progress.load(resumed)
    before = {"steps": len(progress.losses), "seen": progress.seen, "computed": progress.computed}
    if resumed is not None:
        log.info("going on from %s", resumed)
    if resumed is not None and (len(progress.losses) >= steps or progress.stopped_early):
        load_parameters(trainee.parameters, resumed / (BEST if params.keep == "best" else ADAPTER))
    else:
        tokenizer = load_tokenizer(base)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        recorder = Recorder(params, store, stop, progress, speed)
        with tempfile.TemporaryDirectory(prefix="regraft-trainer-") as scratch:
            settings = _settings(params, model, Path(scratch))
            own: dict[str, Any] = {"params": params, "progress": progress, "callbacks": [recorder]}
            if params.objective == "supervised":
                collator = partial(collate, pad_id=pad_id)
                own["held_out"] = held_out and as_arrays(held_out)
                trainer = AdapterTrainer(trainee, _arguments(settings), collator, as_arrays(rows), **own)
            else:
                from regraft.train.preference import make_trainer

                trainer = make_trainer(trainee, settings, rows, tokenizer, held_out=held_out, **own)
            recorder.trainer = trainer
            if stop.requested:
                raise Preempted(f"stopped by {stop.requested} before the first step", fix="run the same command again")
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            trainer.release()
        if trainer.state.global_step != steps and not progress.stopped_early:
            raise RegraftError(f"training ended after {trainer.state.global_step} of {steps} steps")
        if trainer.best is not None:
            load_parameters(trainee.parameters, trainer.best)
    return progress, {
        "steps": len(progress.losses) - before["steps"],
        "seen": progress.seen - before["seen"],
        "computed": progress.computed - before["computed"],
    }


def _check_blocks(params: TrainParams, rows: Any) -> None:
    if params.method == "prompt" and any(row["position_ids"].count(0) > 1 for row in rows):
        raise ParamsError(
            "train.method: found prompt with packed blocks, expected one conversation in each: its vectors go before it",
            fix="set preprocess.packing to false",
        )


def _settings(params: TrainParams, model: ModelParams, scratch: Path) -> dict[str, Any]:
    """Return what `TrainingArguments` is to be given."""
    import torch

    dtype, on_gpu = compute_dtype(model.quantization), device().type == "cuda"
    checkpointing = params.gradient_checkpointing and params.sharding == "none"
    return {
        "output_dir": str(scratch),
        "seed": params.seed,
        "data_seed": params.seed,
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": params.scheduler,
        "warmup_steps": params.warmup,
        "num_train_epochs": params.epochs if params.epochs is not None else 1,
        "max_steps": params.max_steps if params.max_steps is not None else -1,
        "per_device_train_batch_size": params.batch_size,
        "gradient_accumulation_steps": params.accumulation,
        "weight_decay": params.weight_decay,
        **(fsdp_arguments(params) if params.sharding == "full" else {}),
        "ddp_backend": None if on_gpu or crew.size() == 1 else "gloo",
        "ddp_find_unused_parameters": False,
        "adam_beta2": params.beta2,
        "max_grad_norm": params.max_grad_norm,
        "optim": params.optimizer,
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        **(
            {"accelerator_config": {"non_blocking": True}} if on_gpu else {}
        ),  # batches are copied while a step computes
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def _arguments(settings: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(**settings)
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
    libraries = (*_LIBRARIES, *(("trl",) if params.objective != "supervised" else ()))
    return {
        **_sections(params, model),
        "base": base.report.digest,
        "tokenizer": base.report.tokenizer_digest,
        "data": blocks.digest,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
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
    trainee: Trainee,
    digest: str,
) -> TrainReport:
    parameters = trainee.parameters
    norms = {key: float(parameter.detach().norm()) for key, parameter in parameters.items()}
    broken = [key for key, parameter in parameters.items() if not bool(parameter.isfinite().all())]
    expected = trainee.expected
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
    rows, _ = split(blocks.rows, params.validation_share)
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
        method=params.method,
        parent=params.parent_digest,
        planned_steps=steps if progress.stopped_early else planned_steps(params, len(rows)),
        steps=steps,
        preference=_preference(params, progress, trainee),
        blocks=len(rows),
        tokens_seen=progress.seen,
        tokens_trained=sum(progress.trained),
        loss_first=first,
        loss_last=last,
        loss_decreased=last < first,
        all_finite=not broken and all(math.isfinite(loss) for loss in progress.losses),
        non_finite_steps=[step for step, loss in enumerate(progress.losses, 1) if not math.isfinite(loss)],
        non_finite_parameters=broken,
        grad_norm_largest=progress.grad_norm_largest,
        held_out=progress.held_out,
        kept_step=progress.best_step if params.keep == "best" else None,
        stopped_early=progress.stopped_early,
        adapted_modules=modules,
        expected_modules=expected,
        bare_weights=trainee.bare,
        unquantized_modules=trainee.unquantized,
        trained_whole=[key for key in parameters if ".lora_A." not in key and ".lora_B." not in key],
        missing_modules=sorted(set(expected) - {module.name for module in modules}),
        zero_b=[module.name for module in modules if module.b_norm == 0],
        trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
        total_parameters=base.report.parameters,
    )


def _preference(params: TrainParams, progress: "Progress", trainee: Trainee) -> PreferenceResult | None:
    if params.objective == "supervised":
        return None
    steps = len(progress.losses)
    tenth = max(1, steps // 10)
    ends = ((0, tenth), (steps - tenth, steps))
    margins = [progress.margin(*each) for each in ends]
    accuracies = [progress.mean_of(progress.accuracies, *each) if progress.accuracies else None for each in ends]
    return PreferenceResult(
        objective=params.objective,
        beta=params.preference.beta,
        loss=params.preference.loss or {"dpo": "sigmoid", "kto": "kto"}.get(params.objective, "odds_ratio"),
        reference=reference_of(params, started=bool(trainee.start.tensors)),
        margin_first=margins[0],
        margin_last=margins[1],
        accuracy_first=accuracies[0],
        accuracy_last=accuracies[1],
    )


def _finite_or(value: float, otherwise: float = -1.0) -> float:
    return value if math.isfinite(value) else otherwise
