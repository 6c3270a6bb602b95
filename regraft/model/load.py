"""One way to open and load the base model, used by train, evaluate and export: checked, and safetensors only."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_json, read_json
from regraft.errors import MissingInput, ParamsError, PinMismatch
from regraft.model.params import Quantization, keeps_fp32
from regraft.model.pin import MODEL_FILES, TOKENIZER_FILES, check_folder, digest_files, weights_folder
from regraft.model.report import BaseReport
from regraft.model.tokens import FOLDER, make_room, new_token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # all that they are is in tokenizer.json


@dataclass(frozen=True)
class Base:
    """A base model whose files were found to be the pinned ones."""

    report: BaseReport
    folder: Path
    """Weights, configuration and tokenizer."""
    extended: Path | None = None
    """Folder of the tokenizer with new tokens, where it was extended."""

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that texts are encoded with."""
        return self.extended or self.folder

    @property
    def new_tokens(self) -> dict[str, int]:
        """Ids of the tokens that the base's own tokenizer lacks."""
        return new_token_ids(self.extended, self.report.new_tokens) if self.extended is not None else {}

    @property
    def name(self) -> str:
        """What adapters and model cards call it."""
        return self.report.name


def open_base(folder: Path, *, weights: bool = True) -> Base:
    """Open the output of the stage `model` and check the files that it pinned, byte by byte.

    Args:
        folder: `data/work/model`.
        weights: also check the weights; without, only the tokenizer (many gigabytes less to read).

    Raises:
        MissingInput: the stage has not run, or files are missing.
        PinMismatch: base or tokenizer differ; the message names both digests.
    """
    if not (folder / "report.json").is_file():
        raise MissingInput(f"{folder / 'report.json'} is missing", fix="dvc repro model")
    report = BaseReport.load(folder / "report.json")
    where = weights_folder(report, folder)
    if not where.is_dir():
        raise MissingInput(f"the base model's folder {where} is missing", fix="put it back, or change model.base")
    check_folder(where)
    extended = folder / FOLDER if report.new_tokens else None
    tokenizer = extended or where
    if not tokenizer.is_dir():
        raise MissingInput(f"the tokenizer's folder {tokenizer} is missing", fix="dvc repro model")
    found = digest_json(digest_files(tokenizer, TOKENIZER_FILES))
    _compare("tokenizer", report.tokenizer_digest, found, report, tokenizer)
    if weights:
        _compare("base model", report.digest, digest_json(digest_files(where, MODEL_FILES)), report, where)
    return Base(report=report, folder=where, extended=extended)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """Load the base's tokenizer, extended where `new_tokens` say so, with its chat template; no code from the model's folder runs."""
    path = base.tokenizer / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.is_file() else None
    if named in _GENERIC and (base.tokenizer / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(base.tokenizer, local_files_only=True)
    from transformers import AutoTokenizer  # imports torch, which takes seconds

    return AutoTokenizer.from_pretrained(base.tokenizer, trust_remote_code=False, local_files_only=True)


def load_model(
    base: Base,
    quantization: Quantization | None,
    *,
    training: bool,
    attention: str = "sdpa",
    gpu_memory: float | None = None,
    sharded: bool = False,
) -> "PreTrainedModel":
    """Load the base model onto the first GPU, or the CPU where there is none; its weights are frozen.

    Args:
        base: from `open_base`.
        quantization: how to hold it; None for the weights as they are stored, in their own dtype.
        training: prepare for gradients: no key-value cache. Otherwise it is in evaluation mode.
        attention: `model.attention`; the kernels for packed blocks are used only in training.
        gpu_memory: GiB that the weights of an int8 base may take of the GPU; the layers beyond it lie in the host's
            memory, unquantised, and come to the GPU when they compute. Not for training. Without a GPU it means nothing.
        sharded: load into the host's memory, to be shared out over several GPUs; 4-bit weights in a floating type.

    Raises:
        ParamsError: `gpu_memory` for training, for a base that is not int8, or too small for anything.
    """
    quiet_libraries()
    if gpu_memory is not None:
        _check_offload(quantization, training=training)
    from transformers import AutoConfig, AutoModelForCausalLM

    from regraft.model.attention import implementation

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    kernel = implementation(attention, training=training, dtype=_dtype(quantization), config=config)
    settings = _quantized(quantization)
    placement: dict[str, Any] = {"": "cpu" if sharded else device()}
    if sharded and quantization is not None and quantization.bits == 4:
        # FSDP shares out floating types only, and those of a group as one: the type of all other weights.
        settings["quantization_config"].bnb_4bit_quant_storage = settings["dtype"]
    if gpu_memory is not None and (place := _gpu()) is not None:
        placement = placed(config, quantization, int(gpu_memory * 2**30), place)
        settings["quantization_config"].llm_int8_enable_fp32_cpu_offload = True
        settings["offload_buffers"] = True
    model = AutoModelForCausalLM.from_pretrained(
        base.folder,
        device_map=placement,
        attn_implementation=kernel,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **settings,
    )
    make_room(model, base.new_tokens)
    model.requires_grad_(False)
    model.config.use_cache = not training
    mend_4bit(model)
    return model.train(training)


def placed(config: Any, quantization: Quantization | None, budget: int, gpu: "torch.device") -> dict[str, Any]:
    """Return which modules of an int8 base lie on the GPU and which in the host's memory (`cpu`).

    Not `device_map="auto"`: transformers takes layers for offloaded only where a map names them.

    Args:
        config: the model's.
        quantization: of 8 bits.
        budget: bytes for weights on the GPU.
        gpu: what stands for it in the map.

    Raises:
        ParamsError: not one layer fits.
    """
    import torch
    from accelerate import infer_auto_device_map, init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(quantization))
    model.tie_weights()
    output = model.get_output_embeddings()
    bytes_each = {
        f"{name}.weight": torch.int8
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not output
    }
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it looks for a device 0
    found = infer_auto_device_map(
        model,
        max_memory={0: budget, "cpu": 2**62},
        no_split_module_classes=model._no_split_modules,
        special_dtypes=bytes_each,
        offload_buffers=True,
    )
    if 0 not in found.values():
        raise ParamsError(
            f"evaluate.gpu_memory: {budget / 2**30:.2f} GiB hold no part of this base",
            fix="raise evaluate.gpu_memory, or set it to null",
        )
    return {name: gpu if where == 0 else where for name, where in found.items()}


def refuse_spread(model: Any) -> None:
    """Refuse a base that does not lie on one device whole: gradients and checkpoints are not made for it.

    Raises:
        ParamsError: it was loaded with `device_map="auto"` or an offload.
    """
    places = sorted({str(where) for where in getattr(model, "hf_device_map", {}).values()})
    if len(places) > 1 or any(parameter.is_meta for parameter in model.parameters()):
        raise ParamsError(
            f"a base spread over {', '.join(places)} is for evaluation only; training wants it whole on one device",
            fix="train with 4 bits, a smaller plan (`regraft plan`), or several processes (train.processes)",
        )


def _check_offload(quantization: Quantization | None, *, training: bool) -> None:
    bits = quantization.bits if quantization is not None else None
    if training or bits != 8:
        expected = "training on one device" if training else "it only with model.quantization.bits 8"
        raise ParamsError(
            f"evaluate.gpu_memory: found it {'for training' if training else f'with {bits} bits'}, expected {expected}",
            fix="set evaluate.gpu_memory to null",
        )


def _gpu() -> "torch.device | None":
    """The GPU that layers are offloaded from; None where there is none."""
    return device() if device().type == "cuda" else None


def prepare_for_adapters(model: "PreTrainedModel", quantization: Quantization) -> None:
    """Cast what stays unquantised of a 4- or 8-bit base as `unquantized` says, in place.

    PEFT's `prepare_model_for_kbit_training` casts it to fp32 always. Under autocast the output layer multiplies in 16
    bits all the same, and an embedding's rows keep their values: what fp32 buys is the range and the rounding of the
    stream between layers, at the price of twice its memory.
    """
    import torch

    if quantization.bits >= 16 or not keeps_fp32(quantization.unquantized, fp16=_dtype(quantization) == torch.float16):
        return
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() == 2 and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.float32)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quiet_libraries() -> None:
    """Keep notes that mean nothing here out of a stage's output; call it before peft or bitsandbytes is imported."""
    # "Failed to load CPU gemm_4bit_forward from kernels-community": no kernels from a hub, which is as it should be
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def device() -> "torch.device":
    """The device that stages compute on: the first GPU, or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(quantization: Quantization) -> "torch.dtype":
    """What `compute_dtype` means on this machine."""
    import torch

    if quantization.compute_dtype == "auto":
        if not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[quantization.compute_dtype]


def mend_4bit(model: "torch.nn.Module") -> None:
    """Keep 4-bit layers from repacking their weights in place on a CPU with AVX512-BF16.

    They would do so at the first forward without gradients, and then dequantise to wrong weights without an error
    (bitsandbytes #2078). Call it on every model that was quantised after `load_model`, too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute that nn.Module knows


def _dtype(quantization: Quantization | None) -> "torch.dtype":
    import torch

    return torch.float32 if quantization is None or quantization.bits == 32 else compute_dtype(quantization)


def _quantized(quantization: Quantization | None) -> dict[str, Any]:
    if quantization is None:
        return {"dtype": "auto"}
    dtype = compute_dtype(quantization)
    if quantization.bits == 16:
        return {"dtype": dtype if quantization.compute_dtype != "auto" else "auto"}
    if quantization.bits == 32:
        import torch

        return {"dtype": torch.float32}
    from transformers import BitsAndBytesConfig

    # A list given replaces the library's own choice, so the output layer must be in it.
    skip = sorted({*quantization.skip_modules, "lm_head"}) if quantization.skip_modules else None
    if quantization.bits == 8:
        return {
            "dtype": dtype,
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_threshold=quantization.int8_threshold, llm_int8_skip_modules=skip
            ),
        }
    return {
        "dtype": dtype,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        ),
    }


def _compare(what: str, pinned: str, found: str, report: BaseReport, where: Path) -> None:
    if found == pinned:
        return
    present = digest_files(where)
    names = [n for n in sorted({*present, *report.files}) if present.get(n) != report.files.get(n)]
    raise PinMismatch(
        f"the {what} in {where} is not the pinned one: digest {found}, pinned {pinned} (differing: {', '.join(names)})",
        fix="restore the files; to use the new ones, pin them with `dvc repro --force --single-item model`",
    )
