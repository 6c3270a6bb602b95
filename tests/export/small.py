"""Tiny bases of several architectures, adapters with a known effect, and what PEFT makes of them."""

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def make_gpt2(folder: Path, *, dtype: str = "bfloat16") -> Path:
    """A random GPT-2: linear layers stored in x out (Conv1D), square ones among them, and tied embeddings."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_llama(folder: Path, *, dtype: str = "bfloat16", tied: bool = False, shard: str = "5GB") -> Path:
    """A random Llama without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int = 3, embeddings: bool = False, **lora: Any) -> Path:
    """An adapter in PEFT's format whose A and B are random."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    with quiet():
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_magnitude" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
            elif ".lora_" in name:
                parameter.data.normal_(0, 0.3)
            elif parameter.requires_grad:  # modules saved whole, trained tokens, biases
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of names that transformers deprecates, and of tied embeddings, which are what some tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # fused experts' other modules
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings(
            "ignore", message=r"Adapter 'default': \d+ LoRA tensor"
        )  # biases in B have one dimension
        yield


def adapted(base: Path, adapter: Path) -> Any:
    """PEFT's model of an adapter on a base."""
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(load(base), adapter).eval()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def peft_merged(base: Path, adapter: Path) -> dict[str, Any]:
    """State dict of PEFT's own merge."""
    return dict(adapted(base, adapter).merge_and_unload().state_dict())


def save_peft_merged(base: Path, adapter: Path, folder: Path) -> Path:
    """PEFT's own merge in files, named as the base's."""
    adapted(base, adapter).merge_and_unload().save_pretrained(folder)
    return folder


def make_model(kind: str, folder: Path, *, dtype: str = "bfloat16", **more: Any) -> Path:
    """A random model of a kind (those of `ARCHITECTURES` with what they need), every parameter of it random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    settings = {**SIZES, **ARCHITECTURES.get(kind, {}), **more}
    config = AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LAX = {"max_mean_kl": 0.1, "max_form_mean_kl": 1.0, "min_form_top1_agreement": 0.5, "max_exact_match_drop": 1.0}
"""Thresholds that weights of a model this small pass in few bits."""
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "stablelm": {"use_qkv_bias": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "bias": True, "head_dim": None},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "gpt_oss": MOE,
}


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a model's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


REQUESTS = ("where is my lamp", "cancel the sofa order", "what are the opening hours", "the chair is broken", "refund")
ANSWERS = ('{"action": "track_order", "item": "lamp"}', '{"action": "cancel_order", "item": "sofa"}', "9")


PARAMS = """\
model: {base: BASE}
evaluate: {max_new_tokens: 16, threads: 1}
export: {min_top1_agreement: 0.95, max_mean_kl: 0.001}
"""


def make_clone(root: Path, *, size: float = 0.1, family: str | None = None) -> str:
    """Write everything that an export reads, as the stages leave it in a clone, and return the version's identity.

    Args:
        root: where to.
        size: of the adapter's factors.
        family: a model with a sentencepiece tokenizer of this family (`pieces.make`) instead of byte-level BPE.
    """
    import pieces
    import tiny

    from regraft.artifacts import digest_json, write_json
    from regraft.layout import Layout
    from regraft.model.load import open_base
    from regraft.model.params import ModelParams
    from regraft.model.pin import pin

    layout = Layout(root)
    weights = pieces.make_base(root / "base", family) if family else tiny.make_base(root / "base")
    (weights / "LICENSE").write_text("Do as you like.\n")
    (weights / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    layout.params.write_text(PARAMS.replace("BASE", str(weights)))
    pin(ModelParams(base=str(weights)), corpus=root / "none", out=layout.stage("model"))
    base = open_base(layout.stage("model")).report
    digest = _make_own_adapter(weights, layout.stage("train") / "adapter", size)
    _make_holdout(weights, layout.stage("preprocess"), base.tokenizer_digest)
    parts = {"adapter": digest, "base": base.digest, "tokenizer": base.tokenizer_digest}
    parts |= {"data": "d" * 64, "params": "e" * 64}
    data = {"validated": {"rows": 5}, "processed": {"train_digest": "d" * 64}}
    write_json(root / "lineage.json", {"identity": {"digest": digest_json(parts), **parts}, "data": data})
    return digest_json(parts)


def export_here(root: Path, *, attention: str = "sdpa", **changed: Any) -> Any:
    """Export in this process, with the clone's files and some parameters changed."""
    from regraft.artifacts import read_json
    from regraft.evaluate.params import EvaluateParams
    from regraft.export.export import export
    from regraft.export.params import ExportParams
    from regraft.layout import Layout
    from regraft.model.params import Quantization

    layout, lineage = Layout(root), read_json(root / "lineage.json")
    return export(
        ExportParams(**{"min_top1_agreement": 0.95, "max_mean_kl": 0.001, **changed}),
        Quantization(),
        EvaluateParams(max_new_tokens=16, threads=1),
        base=layout.stage("model"),
        adapter=layout.stage("train") / "adapter",
        dataset=layout.stage("preprocess"),
        lineage=lineage,
        out_root=layout.exports,
        identity=lineage["identity"]["digest"],
        attention=attention,
    )


def export_command(root: Path, identity: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m regraft.export` in the clone."""
    command = [sys.executable, "-m", "regraft.export", "--adapter", "data/work/train/adapter"]
    command += ["--lineage", "lineage.json", "--identity", identity, *more]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks, with its bytes; of a link, where it points."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or (path.is_file() and path.name != "lock")
    }


def _make_own_adapter(weights: Path, folder: Path, size: float) -> str:
    """An adapter as `train` writes it; with factors of size 0.1 large enough to change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from regraft.model.adapter import save_adapter

    with quiet():
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(load(weights), config)
    torch.manual_seed(4)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            parameter.data.normal_(0, size)
    return save_adapter(model, folder, base_name="tiny")


def _make_holdout(weights: Path, folder: Path, tokenizer_digest: str) -> None:
    from transformers import AutoTokenizer

    from regraft.artifacts import commit_dir, write_json

    tokenizer = AutoTokenizer.from_pretrained(weights)
    rows = conversations(tokenizer, REQUESTS, ANSWERS)
    with commit_dir(folder) as out:
        write_rows(out / "holdout-00000.arrow", rows)
        write_json(out / "report.json", {"schema_version": 1, "tokenizer_digest": tokenizer_digest})


def conversations(tokenizer: Any, requests: Iterable[str], answers: Iterable[str]) -> list[dict[str, Any]]:
    """Every request with every answer, as rows of a holdout."""
    from regraft.artifacts import digest_json
    from regraft.chat import render, render_prompt

    rows = []
    for request, answer in itertools.product(requests, answers):
        prompt = [{"role": "user", "content": request}]
        ids, labels = render(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        rows.append(
            {
                "row_id": digest_json([request, answer])[:32],
                "slices": [("kind", "test")],
                "prompt": "[]",
                "answer": answer,
                "prompt_ids": render_prompt(tokenizer, prompt),
                "input_ids": ids,
                "labels": labels,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as preparation does: those of a holdout, or blocks of training."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    kinds = dict.fromkeys(("row_id", "prompt", "answer"), pa.string())
    kinds |= {"slices": pa.map_(pa.string(), pa.string())}
    schema = pa.schema([(name, kinds.get(name, ids)) for name in rows[0]])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
