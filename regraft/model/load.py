"""One way to open and load the base model, used by train, evaluate and export: checked, and safetensors only."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_json, read_json
from regraft.errors import MissingInput, PinMismatch
from regraft.model.params import Quantization
from regraft.model.pin import MODEL_FILES, TOKENIZER_FILES, WEIGHTS, check_folder, digest_files, hub_folder
from regraft.model.report import BaseReport

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
    where = _weights_folder(report, folder)
    if not where.is_dir():
        raise MissingInput(f"the base model's folder {where} is missing", fix="put it back, or change model.base")
    check_folder(where)
    _compare("tokenizer", report.tokenizer_digest, digest_json(digest_files(where, TOKENIZER_FILES)), report, where)
    if weights:
        _compare("base model", report.digest, digest_json(digest_files(where, MODEL_FILES)), report, where)
    return Base(report=report, folder=where)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """Load the base's own tokenizer with its chat template; no code from the model's folder runs."""
    path = base.folder / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.is_file() else None
    if named in _GENERIC and (base.folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(base.folder, local_files_only=True)
    from transformers import AutoTokenizer  # imports torch, which takes seconds

    return AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)


def load_model(
    base: Base, quantization: Quantization | None, *, training: bool, attention: str = "sdpa"
) -> "PreTrainedModel":
    """Load the base model onto the first GPU, or the CPU where there is none; its weights are frozen.

    Args:
        base: from `open_base`.
        quantization: how to hold it; None for the weights as they are stored, in their own dtype.
        training: prepare for gradients: no key-value cache. Otherwise it is in evaluation mode.
        attention: `model.attention`; the kernels for packed blocks are used only in training.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    from regraft.model.attention import implementation

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    kernel = implementation(attention, training=training, dtype=_dtype(quantization), config=config)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder,
        device_map={"": device()},
        attn_implementation=kernel,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **_quantized(quantization),
    )
    model.requires_grad_(False)
    model.config.use_cache = not training
    mend_4bit(model)
    return model.train(training)


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


def _weights_folder(report: BaseReport, folder: Path) -> Path:
    if report.source == "standin":
        return folder / WEIGHTS  # wherever the stage's output lies
    if report.source == "hub" or report.path is None:
        return hub_folder(report.base, report.revision, offline=True)
    return Path(report.path)


def _compare(what: str, pinned: str, found: str, report: BaseReport, where: Path) -> None:
    if found == pinned:
        return
    present = digest_files(where)
    names = [n for n in sorted({*present, *report.files}) if present.get(n) != report.files.get(n)]
    raise PinMismatch(
        f"the {what} in {where} is not the pinned one: digest {found}, pinned {pinned} (differing: {', '.join(names)})",
        fix="restore the files; to use the new ones, pin them with `dvc repro --force --single-item model`",
    )
