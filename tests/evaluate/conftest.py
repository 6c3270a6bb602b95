"""A pinned tiny base, a holdout made by hand, and an adapter: what `evaluate` reads."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from regraft.artifacts import commit_dir, write_json

REQUESTS = (
    "where is my lamp",
    "cancel the order of my sofa please",
    "could you tell me today how many of the 12 chair are not arrived",
    "track",
    "return it",
    "what opening hours has the store tomorrow",
)


@dataclass(frozen=True)
class Place:
    """Folders as the stages leave them."""

    base: Path
    dataset: Path
    adapter: Path


def write_holdout(folder: Path, tokenizer: Any, answers: Sequence[str], tokenizer_digest: str) -> Path:
    """Write a holdout of `REQUESTS` with the given answers, in the format of `preprocess`."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in ("row_id", "slices", "prompt", "answer")}
    columns |= {name: [] for name in ("prompt_ids", "input_ids", "labels")}
    for index, (request, answer) in enumerate(zip(REQUESTS, answers, strict=True)):
        messages = [{"role": "user", "content": request}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        columns["row_id"].append(f"{(index * 7) % 11:032x}")  # not in the order of the file
        columns["slices"].append([("length", "short" if len(request) < 20 else "long")])
        columns["prompt"].append(json.dumps(messages))
        columns["answer"].append(answer)
        columns["prompt_ids"].append(prompt_ids)
        columns["input_ids"].append(prompt_ids + answer_ids)
        columns["labels"].append([-100] * len(prompt_ids) + answer_ids)
    ids, text = pa.list_(pa.int32()), pa.string()
    types = {"slices": pa.map_(text, text), "prompt_ids": ids, "input_ids": ids, "labels": ids}
    schema = pa.schema([(name, types.get(name, text)) for name in columns])
    with commit_dir(folder) as temporary:
        with pa.ipc.new_stream(temporary / "holdout-00000.arrow", schema) as stream:
            stream.write_table(pa.table(columns, schema=schema))
        write_json(temporary / "report.json", {"tokenizer_digest": tokenizer_digest})
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int, scale: float = 0.3, dora: bool = False) -> Path:
    """Write an adapter with random A and B for every linear layer of the base in `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from regraft.model.adapter import save_adapter

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT 0.21's own use
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    save_adapter(model, folder, base_name="tiny")
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Place:
    """A pinned base, a holdout whose answers are JSON, and an adapter (read them, don't write into them)."""
    from regraft.model.load import load_tokenizer, open_base
    from regraft.model.params import ModelParams
    from regraft.model.pin import pin

    root = tmp_path_factory.mktemp("evaluate")
    pin(ModelParams(base=str(tiny_base)), corpus=root / "none.txt", out=root / "model")
    opened = open_base(root / "model")
    answers = [json.dumps({"action": "track_order", "item": "lamp"}), '{"action": "cancel_order"}', "12", "a", "b", "c"]
    tokenizer = load_tokenizer(opened)
    dataset = write_holdout(root / "preprocess", tokenizer, answers, opened.report.tokenizer_digest)
    return Place(root / "model", dataset, make_adapter(root / "adapter", tiny_base, seed=1))


@pytest.fixture(scope="session")
def holdout_of(place: Place) -> Callable[[Path, Sequence[str]], Path]:
    """A function that writes a holdout with given answers into a folder."""
    from regraft.model.load import load_tokenizer, open_base

    opened = open_base(place.base)
    tokenizer = load_tokenizer(opened)
    return lambda folder, answers: write_holdout(folder, tokenizer, answers, opened.report.tokenizer_digest)


@pytest.fixture(scope="session")
def adapter_of(tiny_base: Path) -> Callable[..., Path]:
    """A function that writes an adapter for the tiny base."""
    return lambda folder, **changes: make_adapter(folder, tiny_base, **changes)
