"""GGUF for llama.cpp and Ollama: weights, tokenizer and chat template in one file, read back by llama.cpp itself.

Names, types and layout are those of llama.cpp's own converter (`convert_hf_to_gguf.py`), for the architectures that are
tried here. What is not known, above all a tokenizer that splits text in another way, is refused: llama.cpp would load
it and talk gibberish.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import read_json
from regraft.errors import MissingInput, ParamsError, RegraftError
from regraft.export.base import read_config
from regraft.export.tensors import Reader, catalogue

if TYPE_CHECKING:
    import numpy as np

MODEL = "model.gguf"
MODELFILE = "Modelfile"
_K_BLOCK = 256
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PERMUTED = ("llama", "mistral")  # their rotary halves lie interleaved in llama.cpp
_SPLITS = {  # what a tokenizer's first split looks like, and llama.cpp's name for it
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


def write_gguf(merged: Path, out: Path, form: str) -> None:
    """Write `model.gguf` and an Ollama `Modelfile` of a merged model, one tensor in memory at a time.

    Args:
        merged: folder of the merged weights with tokenizer.
        out: gets the files.
        form: `gguf-f16`, `gguf-q8_0`, or `gguf-q4_k_m`, which llama.cpp itself makes of the first; vectors stay in float32,
            as llama.cpp wants them.

    Raises:
        ParamsError: the architecture, its rotary embedding, its tokenizer or (for Q4_K_M) its widths are not known here.
        MissingInput: the package `gguf` is not installed, or for Q4_K_M `llama-cpp-python`.
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
    tokenizer = _tokenizer(merged, config)
    writer = gguf.GGUFWriter(out / MODEL, _ARCHITECTURES[_architecture(config)])
    _settings(writer, config, form, gguf)
    _vocabulary(writer, tokenizer, config, gguf)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, _ARCHITECTURES[_architecture(config)].upper()), config["num_hidden_layers"]
    )
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
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    writer.close()
    (out / MODELFILE).write_text(modelfile(tokenizer, config), encoding="utf-8")


def modelfile(tokenizer: dict[str, Any], config: dict[str, Any]) -> str:
    """Return an Ollama Modelfile. Its template language is Go's: the model's own template is in the GGUF file."""
    stops = [token["content"] for token in tokenizer["added_tokens"] if token["id"] in _ids(config.get("eos_token_id"))]
    lines = [f"FROM ./{MODEL}", "PARAMETER temperature 0"]
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops)]) + "\n"


def _package(name: str, says: str = "", fix: str = "pip install 'regraft[gguf]', or leave the gguf forms out") -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingInput(says or f"the package {name} is not installed", fix=fix) from error


def _architecture(config: dict[str, Any]) -> str:
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ARCHITECTURES or scaled != "default":
        raise ParamsError(
            f"GGUF is written for {', '.join(_ARCHITECTURES)} with plain rotary embeddings; this is {kind} ({scaled})",
            fix="convert the merged folder with llama.cpp's convert_hf_to_gguf.py",
        )
    return kind


def _tokenizer(merged: Path, config: dict[str, Any]) -> dict[str, Any]:
    content = read_json(merged / "tokenizer.json")
    split = _split(content)
    if content.get("model", {}).get("type") != "BPE" or split is None:
        raise ParamsError(
            f"the tokenizer is a {content.get('model', {}).get('type')} that splits text in a way unknown here",
            fix="convert the merged folder with llama.cpp's convert_hf_to_gguf.py",
        )
    template = merged / "chat_template.jinja"
    settings = read_json(merged / "tokenizer_config.json")
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return {**content, "split": split, "template": text, "vocabulary": config["vocab_size"]}


def _split(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the way in which a tokenizer splits text before it merges, None if it has none."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if content.get("normalizer") not in (None, {"type": "NFC"}) or any(step.get("add_prefix_space") for step in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        return next((name for name, regex in _SPLITS.items() if regex == pattern), None)
    return None


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
    rope = config.get("rope_parameters") or {}
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


def _vocabulary(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any], gguf: Any) -> None:
    """Tokens by id, their kinds and merges; rows of the embedding without a token get a name that nobody types."""
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    special = {each["id"]: each for each in tokenizer["added_tokens"]}
    tokens |= {number: each["content"] for number, each in special.items()}
    texts, kinds = [], []
    for number in range(tokenizer["vocabulary"]):
        texts.append(tokens.get(number, f"[PAD{number}]"))
        if number not in tokens:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in special:
            control = special[number].get("special")
            kinds.append(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer["split"])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    ends = _ids(config.get("eos_token_id"))
    if ends:
        writer.add_eos_token_id(ends[0])
    for name in ("bos", "pad"):
        for token in _ids(config.get(f"{name}_token_id"))[:1]:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)  # a chat template writes its own
    if tokenizer["template"]:
        writer.add_chat_template(tokenizer["template"])


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
