"""GGUF for llama.cpp and Ollama: weights, tokenizer and chat template in one file, read back by llama.cpp itself.

Names, types and layout are those of llama.cpp's own converter (`convert_hf_to_gguf.py`), for the architectures that are
tried here. What is not known, above all a tokenizer that splits text in another way, is refused: llama.cpp would load
it and talk gibberish. Where llama.cpp is installed, it reads the file's tokenizer back and must give the same ids.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import MissingInput, ParamsError, RegraftError
from regraft.export.base import read_config
from regraft.export.tensors import Reader, catalogue
from regraft.export.tokens import check_tokens
from regraft.export.vocabulary import Vocabulary, open_tokenizer, read_vocabulary

if TYPE_CHECKING:
    import numpy as np

MODEL = "model.gguf"
MODELFILE = "Modelfile"
_K_BLOCK = 256
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_GEMMA_SLIDING = {"gemma2": 2, "gemma3": 6}  # every so many layers one sees the whole text
_PERMUTED = ("llama", "mistral")  # their rotary halves lie interleaved in llama.cpp


def write_gguf(merged: Path, out: Path, form: str) -> None:
    """Write `model.gguf` and an Ollama `Modelfile` of a merged model, one tensor in memory at a time.

    Args:
        merged: folder of the merged weights with tokenizer.
        out: gets the files.
        form: `gguf-f16`, `gguf-q8_0`, or `gguf-q4_k_m`, which llama.cpp itself makes of the first; vectors stay in float32,
            as llama.cpp wants them.

    Raises:
        ParamsError: the architecture, its rotary embedding, its tokenizer or (for Q4_K_M) its widths are not known here.
        DamagedArtifact: llama.cpp gives other ids than transformers.
        MissingInput: the package `gguf` is not installed; or `llama-cpp-python`, where only that can make the form or prove
            the tokenizer.
    """
    if form == "gguf-q4_k_m":
        _check_widths(merged)
        with tempfile.TemporaryDirectory(prefix=".gguf-f16-", dir=out) as half:
            write_gguf(merged, Path(half), "gguf-f16")
            _quantize(Path(half) / MODEL, out / MODEL)
            shutil.copyfile(Path(half) / MODELFILE, out / MODELFILE)
        return
    gguf = _package("gguf")
    config = read_config(merged)
    architecture = _ARCHITECTURES[_architecture(config)]
    tokenizer = open_tokenizer(merged)
    vocabulary = read_vocabulary(tokenizer, config["vocab_size"])
    writer = gguf.GGUFWriter(out / MODEL, architecture)
    _settings(writer, config, form, gguf)
    if architecture.startswith("gemma"):
        _gemma(writer, config, architecture, merged)
    _vocabulary(writer, vocabulary, tokenizer, config)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    quantized = gguf.GGMLQuantizationType.Q8_0 if form == "gguf-q8_0" else gguf.GGMLQuantizationType.F16
    found = catalogue(merged)
    kinds = {}
    for name, (_, tensor) in found.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ParamsError(f"GGUF has no name for {name}", fix="leave the gguf forms out of export.forms")
        kind = gguf.GGMLQuantizationType.F32 if len(tensor.shape) < 2 else quantized
        if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        kinds[name] = kind
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind.name == "Q8_0" else tensor.shape
        size = {"F32": 4, "F16": 2}.get(kind.name, 1)
        numpy_type = _package("numpy").dtype({"F32": "f4", "F16": "f2"}.get(kind.name, "u1"))
        count = 1
        for each in shape:
            count *= each
        writer.add_tensor_info(target, shape, numpy_type, count * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (file, _) in found.items():
        with Reader(merged / file) as reader:
            values = reader.whole(name).float().numpy()
        values = _permuted(name, values, config)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1  # transformers adds it when it computes
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    writer.close()
    check_tokens(out / MODEL, tokenizer, vocabulary)
    (out / MODELFILE).write_text(modelfile(vocabulary.added, config), encoding="utf-8")


def modelfile(added: dict[int, str], config: dict[str, Any]) -> str:
    """Return an Ollama Modelfile. Its template language is Go's: the model's own template is in the GGUF file.

    Args:
        added: the tokenizer's added tokens, by id.
        config: the model's `config.json`.
    """
    stops = [text for number, text in added.items() if number in _ids(config.get("eos_token_id"))]
    # Ollama's default penalty is 1.1 (https://docs.ollama.com/modelfile): JSON repeats its quotes, and so must an answer.
    lines = [f"FROM ./{MODEL}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops)]) + "\n"


def _package(name: str, says: str = "", fix: str = "pip install 'regraft[gguf]', or leave the gguf forms out") -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingInput(says or f"the package {name} is not installed", fix=fix) from error


def _architecture(config: dict[str, Any]) -> str:
    kind = str(config.get("model_type"))
    ropes = [config.get("rope_scaling") or {}, _rope(config, "full_attention"), _rope(config, "sliding_attention")]
    scaled = next(
        (each for rope in ropes if (each := rope.get("rope_type", rope.get("type", "default"))) != "default"), ""
    )
    if kind not in _ARCHITECTURES or scaled:
        raise ParamsError(
            f"GGUF is written for {', '.join(_ARCHITECTURES)} with plain rotary embeddings; this is {kind}"
            + (f" ({scaled})" if scaled else ""),
            fix="convert the merged folder with llama.cpp's convert_hf_to_gguf.py",
        )
    return kind


def _rope(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Rotary embeddings of a kind of layer; most models have one kind."""
    parameters: dict[str, Any] = config.get("rope_parameters") or {}
    if "full_attention" not in parameters:
        return parameters
    found: dict[str, Any] = parameters.get(kind) or {}
    return found


def _gemma(writer: Any, config: dict[str, Any], architecture: str, merged: Path) -> None:
    """Write what Gemma has besides; what llama.cpp takes for granted of it is checked.

    Raises:
        ParamsError: llama.cpp computes such a Gemma otherwise.
    """
    problems = []
    if any(name.endswith("lm_head.weight") for name in catalogue(merged)):
        problems.append("its output layer is not the embedding")
    every = _GEMMA_SLIDING.get(architecture)
    if every is not None:
        expected = [
            "full_attention" if at % every == 0 else "sliding_attention"
            for at in range(1, 1 + config["num_hidden_layers"])
        ]
        if config.get("layer_types", expected) != expected:
            problems.append(f"not every {every}th layer, and only that, sees the whole text")
        scale = config.get("query_pre_attn_scalar", 256)
        if scale != config["head_dim"] and config["num_hidden_layers"] not in (
            46,
            62,
        ):  # the two of 27B have another one
            problems.append(f"query_pre_attn_scalar is {scale}, head_dim {config['head_dim']}")
        writer.add_sliding_window(config["sliding_window"])
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(name):
                getattr(writer, f"add_{name}")(config[name])
    if architecture == "gemma3":
        local = config.get("rope_local_base_freq", _rope(config, "sliding_attention").get("rope_theta", 10000.0))
        writer.add_rope_freq_base_swa(float(local))
    if problems:
        raise ParamsError(
            f"llama.cpp computes a {architecture} otherwise than this one: " + "; ".join(problems),
            fix="leave the gguf forms out of export.forms",
        )


def _check_widths(merged: Path) -> None:
    """Refuse what llama.cpp would quietly store in another type than Q4_K, whose blocks have 256 weights."""
    odd = sorted(
        {
            tensor.shape[-1]
            for name, (_, tensor) in catalogue(merged).items()
            if len(tensor.shape) == 2 and tensor.shape[-1] % _K_BLOCK
        }
    )
    if odd:
        raise ParamsError(
            f"Q4_K needs widths that {_K_BLOCK} divides, the model has {', '.join(map(str, odd))}",
            fix="use gguf-q8_0 in export.forms",
        )


def _quantize(source: Path, target: Path) -> None:
    """Let llama.cpp write Q4_K_M: Q4_K, and Q6_K where that helps most (https://github.com/ggml-org/llama.cpp/pull/1684)."""
    llama_cpp = _package(
        "llama_cpp",
        "llama-cpp-python is not installed, and only llama.cpp makes Q4_K_M",
        "make llama-cpp (it compiles for minutes), or use gguf-q8_0 in export.forms",
    )
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if failed or not target.is_file():
        raise RegraftError(f"llama.cpp cannot make Q4_K_M of {source.name}: it returned {failed}", fix="use gguf-q8_0")


def _settings(writer: Any, config: dict[str, Any], form: str, gguf: Any) -> None:
    heads = config["num_attention_heads"]
    rope = _rope(config, "full_attention")
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if form == "gguf-q8_0" else gguf.LlamaFileType.MOSTLY_F16)


def _vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any, config: dict[str, Any]) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name in ("eos", "bos", "pad", *(("unk",) if vocabulary.model == "llama" else ())):
        own = getattr(tokenizer, f"{name}_token_id") if vocabulary.model == "llama" else None
        for token in [*_ids(config.get(f"{name}_token_id")), *_ids(own)][:1]:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.space_first is not None:
        writer.add_add_eos_token(False)  # a prompt goes on
        writer.add_add_space_prefix(vocabulary.space_first)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _permuted(name: str, values: "np.ndarray[Any, Any]", config: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """Interleave the rotary halves of queries and keys, as llama.cpp's llama expects them."""
    if config["model_type"] not in _PERMUTED or not name.endswith(
        ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    ):
        return values
    heads = config["num_attention_heads"]
    if "k_proj" in name:
        heads = config.get("num_key_value_heads") or heads
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)
