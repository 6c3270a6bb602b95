"""What the benchmarks on a GPU share: models of any shape without files, our trainer and TRL's on them, one report.

Weights are random: memory and speed don't depend on their values. A model is made on the device layer by layer and
quantised as it is made, so that a 65B shape never exists in 16 bits.
"""

import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

GIB = 2**30
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "accelerate")
LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **LLAMA, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "1b": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "exaone-2.4b": {
        **LLAMA, "vocab_size": 102400, "hidden_size": 2560, "intermediate_size": 7168, "num_hidden_layers": 30,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8b": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "65b": {
        **LLAMA, "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 64,
    },
}  # fmt: skip
"""Llama's architecture in the sizes of released models; EXAONE-2.4B's in Llama's form."""


def make_model(shape: dict[str, Any], bits: int, *, attention: str, seed: int = 0) -> Any:
    """Make a frozen base of a shape on the device, as `regraft.model.load.load_model` leaves one for training."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from regraft.model.load import device, mend_4bit, quiet_libraries

    quiet_libraries()
    where = device()
    config = AutoConfig.for_model(**shape)
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    torch.manual_seed(seed)
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if bits == 4 and type(module) is torch.nn.Linear and module is not output:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _four_bits(module, where))
        elif "RotaryEmbedding" in type(module).__name__:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(config=config).to(where))
        else:
            for key, parameter in list(module.named_parameters(recurse=False)):
                made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=where)
                made = made.fill_(1.0) if parameter.ndim == 1 else made.normal_(0, 0.02)
                setattr(module, key, torch.nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    if bits == 4:
        model.is_loaded_in_4bit = True
    mend_4bit(model)
    return model.requires_grad_(False).train()


def _four_bits(layer: Any, where: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    made = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device=where).normal_(0, 0.02)
    dtype = torch.bfloat16
    out = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    out.weight = bnb.nn.Params4bit(made, requires_grad=False, quant_type="nf4", compress_statistics=True, module=out)
    packed, state = bnb.functional.quantize_4bit(made, blocksize=64, compress_statistics=True, quant_type="nf4")
    out.weight.data, out.weight.quant_state, out.weight.bnb_quantized = packed, state, True
    out.quant_state = state
    return out


def make_rows(vocabulary: int, length: int, count: int, *, documents: int = 1, seed: int = 0) -> Any:
    """Make packed blocks of random tokens, all trained, each of so many documents of equal length."""
    import datasets
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, length), generator=generator).tolist()
    part = length // documents
    positions = [index % part for index in range(length)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": [positions] * count})


@contextlib.contextmanager
def capped(gib: float | None) -> Iterator[None]:
    """Let torch take at most so many GiB of the card."""
    import torch

    if gib is None or not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def ours(
    shape: dict[str, Any], model_params: Any, params: Any, rows: Any, *, warmup: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Train with Regraft's own trainer on a made base; tokens a second are of the steps after the first `warmup`."""
    import torch
    from transformers import AutoConfig, TrainerCallback

    from regraft.model.attention import implementation
    from regraft.model.load import compute_dtype
    from regraft.train import adapt, trainer
    from regraft.train.data import as_arrays, collate
    from regraft.train.loop import AdapterTrainer, Progress

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            times.append(time.monotonic())

    free()
    dtype = compute_dtype(model_params.quantization)
    config = AutoConfig.for_model(**shape)
    attention = implementation(model_params.attention, training=True, dtype=dtype, config=config)
    base = [make_model(shape, model_params.quantization.bits, attention=attention, seed=seed)]  # held once
    with patch.object(adapt, "load_model", lambda *_, **__: base.pop()):
        trainee = adapt.make_trainee(params, model_params, None, None, None)  # type: ignore[arg-type]
    reset_peak()
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AdapterTrainer(
            trainee,
            trainer._arguments(trainer._settings(params, model_params, Path(scratch))),
            partial(collate, pad_id=0),
            as_arrays(rows),
            params=params,
            callbacks=[Clock()],
            progress=progress,
        )
        run.train()
    figures = _figures(progress.losses, times, len(rows[0]["input_ids"]), params, warmup)
    figures["adapter_norm"] = float(
        torch.sqrt(sum(p.detach().double().square().sum() for p in trainee.parameters.values()))  # type: ignore[arg-type]
    )
    figures["paged_mib"] = round(_paged(run.optimizer) / 2**20, 1)
    del run, trainee
    free()
    return figures


def _paged(optimizer: Any) -> int:
    """Bytes of optimizer states that may lie in the host's memory: torch counts none of them."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(v.nbytes for state in states for v in state.values() if getattr(v, "is_paged", False))


def trl(
    shape: dict[str, Any], bits: int, params: Any, rows: Any, *, liger: bool, warmup: int = 3
) -> dict[str, Any] | None:
    """Train the same with TRL's SFTTrainer; None where `trl` (or Liger, if asked for, and its GPU) is not there."""
    import torch

    if not installed("trl") or (liger and not (installed("liger-kernel") and torch.cuda.is_available())):
        return None
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            times.append(time.monotonic())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    free()
    on_gpu = torch.cuda.is_available()
    model = make_model(shape, bits, attention="sdpa")  # its stream stays in 16 bits: SFTTrainer casts nothing to fp32
    reset_peak()
    with tempfile.TemporaryDirectory(prefix="regraft-bench-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=params.batch_size,
            gradient_accumulation_steps=params.accumulation,
            max_steps=params.max_steps,
            learning_rate=params.learning_rate,
            lr_scheduler_type=params.scheduler,
            warmup_steps=params.warmup,
            optim=params.optimizer,
            gradient_checkpointing=params.gradient_checkpointing,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            use_liger_kernel=liger,
            max_length=None,
            packing=False,  # the rows are full blocks of one document already: there is nothing to pack
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        run = SFTTrainer(
            model,
            args=config,
            train_dataset=rows.select_columns(["input_ids", "labels"]),
            processing_class=_tokenizer(PreTrainedTokenizerFast),
            peft_config=LoraConfig(
                r=params.rank, lora_alpha=params.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )
        run.train()
    figures = _figures(losses, times, len(rows[0]["input_ids"]), params, warmup)
    del run, model
    free()
    return figures


def _tokenizer(kind: Any) -> Any:
    """SFTTrainer wants one; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    return kind(tokenizer_object=Tokenizer(models.BPE(vocab={"<e>": 0}, merges=[])), eos_token="<e>", pad_token="<e>")


def _figures(losses: list[float], times: list[float], length: int, params: Any, warmup: int) -> dict[str, Any]:
    steps = [after - before for before, after in itertools.pairwise(times)][max(0, warmup - 1) :]
    tokens = params.batch_size * params.accumulation * length
    return {
        "tokens_per_second": round(tokens / statistics.median(steps), 1) if steps else None,
        "step_seconds": round(statistics.median(steps), 4) if steps else None,
        "losses": [round(loss, 5) for loss in losses],
        **peak(),
    }


def peak() -> dict[str, float | None]:
    """Memory that torch held and had reserved at the most since `reset_peak`, in MiB; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {"allocated_mib": None, "reserved_mib": None}
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20, 1),
    }


def reset_peak() -> None:
    """Begin to look for the peak now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free() -> None:
    """Give back what earlier runs left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device: its work is asynchronous."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ended."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def installed(name: str) -> bool:
    """Say whether a package is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def goal(name: str, wanted: str, limit: float, measured: float | None) -> dict[str, Any]:
    """One line of the goals; one that was not measured is not met."""
    comparison = {"at least": lambda m: m >= limit, "at most": lambda m: m <= limit}[wanted]
    met = measured is not None and bool(comparison(measured))
    return {"name": name, "wanted": f"{wanted} {limit}", "measured": measured, "met": met}


def hardware() -> dict[str, Any]:
    """The device that was measured, and its host."""
    import torch

    on_gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "gpu": properties.name if properties else None,
        "gpu_gib": round(properties.total_memory / GIB, 1) if properties else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def report(name: str, figures: Any, goals: list[dict[str, Any]], *, tiny: bool, out: Path | None) -> dict[str, Any]:
    """Print the goals, and write NAME.json into a folder: `--out`, else `$OUT`, else `bench/results`."""
    import torch

    measured_on_gpu = torch.cuda.is_available() and not tiny
    content = {
        "dry_run": not measured_on_gpu,
        "figures": figures,
        "goals": goals if measured_on_gpu else [],
        "hardware": hardware(),
        "versions": {each: importlib.metadata.version(each) for each in LIBRARIES if installed(each)},
        "date": datetime.now(UTC).date().isoformat(),
    }
    folder = out or Path(os.environ.get("OUT", Path(__file__).parent.parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for each in content["goals"]:
        print(f"{'ok ' if each['met'] else 'NO '} {each['name']:<52} {each['measured']} ({each['wanted']})")
    if not measured_on_gpu:
        print(f"{name}: a dry run, nothing about a GPU is measured")
    return content
