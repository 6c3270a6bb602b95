"""ONNX for onnxruntime-genai: weights, tokenizer and chat template in a folder, written by that project's own model builder.

The builder takes many architectures, and some of them, some rotary embeddings and some sliding windows it writes without
a word so that they compute something else (0.18.0, on tiny models: OLMo, linear and YaRN rotary embeddings, the windows
of Mistral and Phi-3). So it gets only those whose logits were found to be transformers' own, and the rest is refused by
name. It runs in a process of its own, offline: it holds the whole model in memory and prints much.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import read_json, write_json
from regraft.errors import DamagedArtifact, ParamsError, RegraftError
from regraft.export.base import INPUTS, OUTPUTS, last_name, read_config
from regraft.export.genai import CONFIG, MODEL, runtime, splitting
from regraft.export.tokens import texts
from regraft.export.vocabulary import Vocabulary, open_tokenizer, rendered, tokens_by_id

if TYPE_CHECKING:
    import torch

    from regraft.export.plan import Plan

log = logging.getLogger("regraft")
BITS = {"onnx-fp32": 32, "onnx-int8": 8, "onnx-int4": 4}
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPES = ("default", "llama3")
_BLOCK = 32  # weights with one scale, the builder's default
_TALK = 'Where is "it"?\nÜ 🙂'
_FIX = "leave the onnx forms out of export.forms"
_OPTIONS = ("hf_token=false", "windowed_kv_cache=false")
"""No token is looked for. Layers with a window keep a whole cache: the short one of 0.18.0 fails on texts shorter than it."""


def check_onnx(base: Path, tokenizer: Path) -> None:
    """Refuse what has no ONNX form, by its configuration and its tokenizer: before anything is merged or written.

    Args:
        base: a model's folder; its weights are not looked at.
        tokenizer: the folder of the tokenizer.

    Raises:
        ParamsError: the architecture, its rotary embedding, its window or its kind of tokenizer are not known here.
        DamagedArtifact: onnxruntime-genai gives other ids, or renders conversations otherwise, than transformers.
        MissingInput: a package of the extra `onnx` is not installed.
    """
    runtime()
    config = read_config(base)
    if problems := _problems(config):
        raise ParamsError(f"the model has no ONNX form: {'; '.join(problems)}", fix=_FIX)
    with tempfile.TemporaryDirectory(prefix="regraft-onnx-") as scratch:
        own, written = open_tokenizer(tokenizer), open_tokenizer(tokenizer)
        written.model_max_length = int(config.get("max_position_embeddings", 2048))  # as the builder writes it
        written.save_pretrained(scratch)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)  # of no concern to splitting
        settings = {"type": "llama", "context_length": 1, "vocab_size": config["vocab_size"], "decoder": {}, **ids}
        write_json(Path(scratch) / CONFIG, {"model": settings, "search": {"max_length": 1}})
        check_tokens(Path(scratch), own, config["vocab_size"])


def write_onnx(merged: Path, out: Path, form: str) -> None:
    """Write `model.onnx` with its data, `genai_config.json` and the tokenizer of a merged model.

    Args:
        merged: folder of the merged weights with tokenizer.
        out: gets the files.
        form: `onnx-fp32`, `onnx-int8` or `onnx-int4`; the last two have a scale for 32 weights, and `onnx-int4` has the
            input embedding in 4 bits as well.

    Raises:
        ParamsError, DamagedArtifact, MissingInput: as `check_onnx`, for what was written.
        RegraftError: the builder failed; its last words are in the message.
    """
    runtime()
    config = read_config(merged)
    if problems := _problems(config):
        raise ParamsError(f"the model has no ONNX form: {'; '.join(problems)}", fix=_FIX)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        source.mkdir()
        for path in merged.iterdir():
            (source / path.name).symlink_to(path.resolve())
        # Widened first: the builder adds Gemma's 1 to the weights of its norms in the type that they lie in.
        (source / "config.json").unlink()
        plain = {name: value for name, value in config.items() if name != "torch_dtype"}
        write_json(source / "config.json", {**plain, "dtype": "float32"})
        _build(source, made, "fp32" if form == "onnx-fp32" else form.removeprefix("onnx-"), Path(scratch) / "cache")
        for path in sorted(made.iterdir()):
            path.replace(out / path.name)
    check_tokens(out, open_tokenizer(merged), config["vocab_size"])


def check_tokens(folder: Path, tokenizer: Any, size: int) -> int:
    """Compare ids of several hundred texts, and conversations as both render them; return how many texts were compared.

    Texts with a NUL are left out (onnxruntime-genai ends a text there), and those that are not in the tokenizer's own
    normal form: it composes no characters.

    Args:
        folder: with `genai_config.json` and the tokenizer that onnxruntime-genai reads.
        tokenizer: transformers' own.
        size: rows of the embedding.

    Raises:
        ParamsError: its kind was not tried.
        DamagedArtifact: ids or rendered conversations differ.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := content["model"]["type"]) != "BPE":
        raise ParamsError(f"the tokenizer is a {kind}; ONNX is written with BPE only", fix=_FIX)
    tokens, kinds, added = tokens_by_id(content, max(size, len(tokenizer)))
    vocabulary = Vocabulary("", "", tokens, kinds, added, template=None, add_bos=False)
    normalizer = None if _rewrites_spaces(content) else tokenizer.backend_tokenizer.normalizer
    every = [*rendered(tokenizer), *texts(vocabulary)]
    every = [text for text in every if "\0" not in text]
    if normalizer is not None:
        every = [text for text in every if normalizer.normalize_str(text) == text]
    split, render = splitting(folder)
    wrong = [text for text in every if split(text) != _own(tokenizer, text)]
    if wrong:
        text = min(wrong, key=len)
        raise DamagedArtifact(
            f"onnxruntime-genai splits {len(wrong)} of {len(every)} texts otherwise than transformers: {text!r} is "
            f"{split(text)[:12]}, expected {_own(tokenizer, text)[:12]}",
            fix=_FIX,
        )
    for expected in rendered(tokenizer, _TALK):
        if (found := render(_TALK)) != expected:
            raise DamagedArtifact(
                f"onnxruntime-genai renders a conversation otherwise than transformers: {found!r}, expected {expected!r}",
                fix=_FIX,
            )
    return len(every)


def quantized_linears(plan: "Plan") -> set[str]:
    """Return the changed modules whose weights an ONNX form of few bits holds in blocks: linear layers, the output layer aside."""
    return {
        step.target.name.removesuffix(".weight")
        for step in plan.steps
        if step.terms and len(step.target.shape) == 2 and last_name(step.target.name) not in (*INPUTS, *OUTPUTS)
    }


def round_trip(weight: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Return a linear layer's weight as it lies in an ONNX form of 8 or 4 bits (`out x in`, in float32).

    The quantiser is onnxruntime's own, as the builder uses it: nearest values, symmetric, a scale for 32 inputs of an
    output (`MatMulNBits`, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
    """
    runtime()
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    settings = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, bits=bits)
    values = weight.float().t().contiguous().numpy()
    packed, scales, _ = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(values)
    return dequantized(torch.from_numpy(packed), torch.from_numpy(scales), bits)[:, : weight.shape[1]]


def dequantized(packed: "torch.Tensor", scales: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Return the weights (`out x blocks * 32`) of `MatMulNBits`' packed ones (`out x blocks x bytes`, the low half first)."""
    import torch

    numbers = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    centred = numbers.float() - 2 ** (bits - 1)
    weights: torch.Tensor = (centred * scales.reshape(*centred.shape[:2], 1)).flatten(1)
    return weights


def _problems(config: dict[str, Any]) -> list[str]:
    """Return what the builder does not write as transformers computes it; nothing where all of it was tried."""
    kind = str(config.get("model_type"))
    if config.get("architectures") != [_ARCHITECTURES.get(kind)]:
        names = ", ".join(config.get("architectures") or [])
        return [f"it is a {kind} ({names or 'no architecture named'}), tried are {', '.join(_ARCHITECTURES.values())}"]
    problems = []
    ropes = [rope for name in ("rope_scaling", "rope_parameters") if isinstance(rope := config.get(name), dict)]
    for rope in ropes:
        if (named := rope.get("rope_type", rope.get("type", "default"))) not in _ROPES:
            problems.append(f"its rotary embedding is {named}, tried are {' and '.join(_ROPES)}")
        if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
            problems.append(f"{part} of a head is rotated, tried is all of it")
    longest, window = config.get("max_position_embeddings"), config.get("sliding_window")
    if kind in ("mistral", "phi3") and window is not None and (longest is None or window < longest):
        problems.append(f"it sees the last {window} tokens only (sliding_window), which the builder leaves out")
    if kind == "phi3" and config.get("original_max_position_embeddings", 4096) != longest:
        problems.append("its rotary embedding differs for long texts (original_max_position_embeddings)")
    return problems


def _build(source: Path, out: Path, precision: str, cache: Path) -> None:
    """Run the builder, which imports torch and transformers anew: 6 s of CPU time before its work."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += ["-p", precision, "-e", "cpu", "-c", str(cache), "--extra_options", *_OPTIONS]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command,
        env={**os.environ, **offline, "ORT_DISABLE_TELEMETRY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not all((out / name).is_file() for name in (CONFIG, MODEL)):
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise RegraftError(
            f"onnxruntime-genai's builder ended with code {done.returncode}: {' / '.join(lines[-2:])[-400:] or 'no word'}",
            fix="it needs memory for the whole model in float32, twice for few bits; or " + _FIX,
        )
    made = read_json(out / CONFIG)
    log.info("export: onnxruntime-genai's builder wrote a %s in %s", made["model"]["type"], precision)


def _rewrites_spaces(content: dict[str, Any]) -> bool:
    """Whether the normalizer is sentencepiece's, which changes every text: onnxruntime-genai does the same, or is refused."""
    return "▁" in json.dumps(content.get("normalizer"), ensure_ascii=False)


def _own(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
