"""Every weight of a model by name and shape, from its `config.json` alone: no weights, no torch, no transformers.

The shapes are those of transformers' own classes; a test builds each family on the meta device and compares. What a
configuration leaves out (transformers writes only what differs from its defaults) is taken from the same defaults.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.plan.defaults import DEFAULTS

Kind = Literal["linear", "output", "embedding", "experts", "small"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a model.

    `linear` can be quantised and carry an adapter; `output` is the output layer; `experts` are fused and stay as they
    are stored; `small` is norms, biases and routers.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model."""

    family: str
    weights: tuple[Weight, ...]
    """Every stored tensor once; a tied output layer has none of its own."""
    layers: int
    hidden: int
    intermediate: int
    """Width inside the feed-forward layer, for one token (all experts that it goes through together)."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gated: bool
    """The feed-forward layer multiplies two projections."""
    norms: int
    """Norms in a layer that each read an input of their own; two that read the same one keep it once."""
    layer_norm: bool
    """LayerNorm, one kernel, instead of RMSNorm, which is several."""
    head_norms: bool
    """Queries and keys are normalised, too."""
    fused_qkv: bool
    """One projection makes queries, keys and values."""
    softcap: bool
    """Logits pass through tanh."""
    context: int | None

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return sum(weight.size for weight in self.weights)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every layer that `all-linear` names."""
        return {w.name: (w.shape[0], w.shape[1]) for w in self.weights if w.kind == "linear"}


FAMILIES = tuple(sorted(DEFAULTS))
"""Values of `model_type` that are known here."""


def read_architecture(config: Path) -> Architecture:
    """Read `config.json` (or the folder that holds one).

    Raises:
        MissingInput, DamagedArtifact: there is no such file, or it is not what it should be.
        ParamsError: a family that is not known here.
    """
    path = config / "config.json" if config.is_dir() else config
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing", fix="name a model's folder or its config.json") from error
    except (ValueError, RecursionError) as error:
        raise DamagedArtifact(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedArtifact(f"{path} is not a JSON object")
    return architecture(content)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return what a configuration describes.

    Args:
        config: the content of a `config.json`; of a model with several parts, its `text_config` counts.

    Raises:
        ParamsError: `model_type` is not one of `FAMILIES`.
    """
    if isinstance(config.get("text_config"), dict):
        tie = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
        config = {**tie, **config["text_config"]}
    family = str(config.get("model_type"))
    if family not in DEFAULTS:
        raise ParamsError(
            f"no plan for the model type {family!r}; known are {', '.join(FAMILIES)}",
            fix="name the config.json of a known family whose shapes are alike, or run without a plan",
        )
    c = {**DEFAULTS[family], **{key: value for key, value in config.items() if key in DEFAULTS[family]}}
    try:
        if family == "gpt2":
            return _gpt2(c)
        if family == "gpt_neox":
            return _gpt_neox(c)
        return _falcon(c) if family == "falcon" else _llama_like(family, c)
    except (TypeError, ZeroDivisionError) as error:
        raise DamagedArtifact(f"a {family} configuration with shapes that make no model: {error}") from error


def _llama_like(family: str, c: dict[str, Any]) -> Architecture:
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    kv_heads = c["num_key_value_heads"] or heads
    head_dim = c["head_dim"] or hidden // heads
    qk_norms = family in ("qwen3", "qwen3_moe", "gemma3_text", "exaone4")
    names = {
        "gemma2": _FOUR,
        "gemma3_text": _FOUR,
        "exaone4": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }.get(family, ("input_layernorm", "post_attention_layernorm"))
    bias = c["attention_bias"] and family in ("llama", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")
    experts_of = _moe(family, c)

    def layer(index: int) -> Iterator[Weight]:
        at = f"model.layers.{index}"
        if family == "phi3":
            shapes = {"qkv_proj": ((heads + 2 * kv_heads) * head_dim, hidden), "o_proj": (hidden, heads * head_dim)}
        else:
            shapes = {
                "q_proj": (heads * head_dim, hidden),
                "k_proj": (kv_heads * head_dim, hidden),
                "v_proj": (kv_heads * head_dim, hidden),
                "o_proj": (hidden, heads * head_dim),
            }
        for name, shape in shapes.items():
            with_bias = bias or (family == "qwen2" and name != "o_proj")
            yield from _linear(f"{at}.self_attn.{name}", shape, bias=with_bias)
        if qk_norms:
            yield Weight(f"{at}.self_attn.q_norm", (head_dim,), "small")
            yield Weight(f"{at}.self_attn.k_norm", (head_dim,), "small")
        experts = experts_of(index)
        if experts is not None:
            count, width = experts
            yield Weight(f"{at}.mlp.gate", (count, hidden), "small")
            yield Weight(f"{at}.mlp.experts.gate_up_proj", (count, 2 * width, hidden), "experts")
            yield Weight(f"{at}.mlp.experts.down_proj", (count, hidden, width), "experts")
        else:
            width = c["intermediate_size"]
            up = {"gate_up_proj": 2 * width} if family == "phi3" else {"gate_proj": width, "up_proj": width}
            for name, out in up.items():
                yield from _linear(f"{at}.mlp.{name}", (out, hidden), bias=c["mlp_bias"] and family == "llama")
            yield from _linear(f"{at}.mlp.down_proj", (hidden, width), bias=c["mlp_bias"] and family == "llama")
        for name in names:
            yield Weight(f"{at}.{name}", (hidden,), "small")

    weights = [Weight("model.embed_tokens", (c["vocab_size"], hidden), "embedding")]
    weights += [weight for index in range(layers) for weight in layer(index)]
    weights.append(Weight("model.norm", (hidden,), "small"))
    routed = experts_of(layers - 1)
    return Architecture(
        family=family,
        weights=(*weights, *_output("lm_head", c, hidden)),
        layers=layers,
        hidden=hidden,
        intermediate=c["intermediate_size"] if routed is None else routed[1] * c["num_experts_per_tok"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=c["vocab_size"],
        tied=c["tie_word_embeddings"],
        gated=True,
        norms=len(names),
        layer_norm=False,
        head_norms=qk_norms,
        fused_qkv=family == "phi3",
        softcap=bool(c.get("final_logit_softcapping")),
        context=c["max_position_embeddings"],
    )


_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _moe(family: str, c: dict[str, Any]) -> Any:
    """Return a function from a layer's index to (experts, width), or None where the layer is dense."""
    if family == "mixtral":
        return lambda index: (c["num_local_experts"], c["intermediate_size"])
    if family == "qwen3_moe":
        count, dense = c["num_experts"] or c["num_local_experts"], c["mlp_only_layers"] or ()

        def experts(index: int) -> tuple[int, int] | None:
            sparse = index not in dense and count > 0 and (index + 1) % c["decoder_sparse_step"] == 0
            return (count, c["moe_intermediate_size"]) if sparse else None

        return experts
    return lambda index: None


def _gpt2(c: dict[str, Any]) -> Architecture:
    hidden, layers = c["n_embd"], c["n_layer"]
    inner = c["n_inner"] or 4 * hidden
    weights = [
        Weight("transformer.wte", (c["vocab_size"], hidden), "embedding"),
        Weight("transformer.wpe", (c["n_positions"], hidden), "embedding"),
    ]
    for index in range(layers):
        at = f"transformer.h.{index}"
        weights += _layer_norm(f"{at}.ln_1", hidden)
        weights += _linear(f"{at}.attn.c_attn", (3 * hidden, hidden), bias=True)
        weights += _linear(f"{at}.attn.c_proj", (hidden, hidden), bias=True)
        weights += _layer_norm(f"{at}.ln_2", hidden)
        weights += _linear(f"{at}.mlp.c_fc", (inner, hidden), bias=True)
        weights += _linear(f"{at}.mlp.c_proj", (hidden, inner), bias=True)
    weights += _layer_norm("transformer.ln_f", hidden)
    weights += _output("lm_head", c, hidden)
    return _plain("gpt2", c, weights, layers, hidden, inner, c["n_head"], c["n_head"], c["n_positions"])


def _gpt_neox(c: dict[str, Any]) -> Architecture:
    hidden, layers, inner = c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"]
    weights = [Weight("gpt_neox.embed_in", (c["vocab_size"], hidden), "embedding")]
    for index in range(layers):
        at = f"gpt_neox.layers.{index}"
        weights += _layer_norm(f"{at}.input_layernorm", hidden)
        weights += _layer_norm(f"{at}.post_attention_layernorm", hidden)
        weights += _linear(f"{at}.attention.query_key_value", (3 * hidden, hidden), bias=c["attention_bias"])
        weights += _linear(f"{at}.attention.dense", (hidden, hidden), bias=c["attention_bias"])
        weights += _linear(f"{at}.mlp.dense_h_to_4h", (inner, hidden), bias=True)
        weights += _linear(f"{at}.mlp.dense_4h_to_h", (hidden, inner), bias=True)
    weights += _layer_norm("gpt_neox.final_layer_norm", hidden)
    weights += _output("lm_head", c, hidden)
    heads, context = c["num_attention_heads"], c["max_position_embeddings"]
    own = 1 if c["use_parallel_residual"] else 2
    return _plain("gpt_neox", c, weights, layers, hidden, inner, heads, heads, context, norms=own)


def _falcon(c: dict[str, Any]) -> Architecture:
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    head_dim, inner = hidden // heads, c["ffn_hidden_size"] or 4 * hidden
    new = c["new_decoder_architecture"]
    kv_heads = (c["num_kv_heads"] or heads) if new else 1 if c["multi_query"] else heads
    two = (c["num_ln_in_parallel_attn"] or (2 if new else 1)) == 2
    norms = ("ln_attn", "ln_mlp") if c["parallel_attn"] and two else ("input_layernorm",)
    norms = norms if c["parallel_attn"] else ("post_attention_layernorm", "input_layernorm")
    weights = [Weight("transformer.word_embeddings", (c["vocab_size"], hidden), "embedding")]
    for index in range(layers):
        at = f"transformer.h.{index}"
        qkv = (heads + 2 * kv_heads) * head_dim
        weights += _linear(f"{at}.self_attention.query_key_value", (qkv, hidden), bias=c["bias"])
        weights += _linear(f"{at}.self_attention.dense", (hidden, hidden), bias=c["bias"])
        weights += _linear(f"{at}.mlp.dense_h_to_4h", (inner, hidden), bias=c["bias"])
        weights += _linear(f"{at}.mlp.dense_4h_to_h", (hidden, inner), bias=c["bias"])
        for name in norms:
            weights += _layer_norm(f"{at}.{name}", hidden)
    weights += _layer_norm("transformer.ln_f", hidden)
    weights += _output("lm_head", c, hidden)
    context = c["max_position_embeddings"]
    own = 1 if c["parallel_attn"] else 2
    return _plain("falcon", c, weights, layers, hidden, inner, heads, kv_heads, context, norms=own)


def _plain(
    family: str,
    c: dict[str, Any],
    weights: list[Weight],
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    context: int | None,
    norms: int = 2,
) -> Architecture:
    """A model with LayerNorm, one projection for queries, keys and values, and a feed-forward layer without a gate."""
    return Architecture(
        family=family,
        weights=tuple(weights),
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=c["vocab_size"],
        tied=c["tie_word_embeddings"],
        gated=False,
        norms=norms,
        layer_norm=True,
        head_norms=False,
        fused_qkv=True,
        softcap=False,
        context=context,
    )


def _linear(name: str, shape: tuple[int, int], *, bias: bool) -> list[Weight]:
    weights = [Weight(name, shape, "linear")]
    return [*weights, Weight(f"{name}.bias", shape[:1], "small")] if bias else weights


def _layer_norm(name: str, width: int) -> list[Weight]:
    return [Weight(name, (width,), "small"), Weight(f"{name}.bias", (width,), "small")]


def _output(name: str, c: dict[str, Any], hidden: int) -> list[Weight]:
    return [] if c["tie_word_embeddings"] else [Weight(name, (c["vocab_size"], hidden), "output")]
