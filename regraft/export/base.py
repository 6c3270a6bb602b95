"""A base model as a merge sees it: names and shapes of its tensors, and what its configuration says about them."""

import re
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact
from regraft.export.tensors import catalogue

CONV1D = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""Model types whose linear layers are stored `in x out` (transformers' Conv1D)."""
INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
"""Last names of input embeddings."""
OUTPUTS = ("lm_head", "embed_out", "output_projection")
"""Last names of output layers, which tied models share with the input embedding."""
_RENAMED = ((".mlp.", ".block_sparse_moe."),)
"""Modules that transformers calls otherwise than the files do."""


class BaseModelFiles:
    """Names and shapes of a base's tensors, and how an adapter's names find them; from headers alone."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.tensors = catalogue(folder)
        self.model_type = str(self.config.get("model_type"))
        self.conv1d = self.model_type in CONV1D
        text = self.config.get("text_config")
        inner = text if isinstance(text, dict) else {}
        tied = self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
        stored = any(last_name(name) in OUTPUTS for name in self.tensors)
        self.tied = tied is not False and not (stored and "tie_word_embeddings" not in {**self.config, **inner})

    def find(self, wanted: str) -> list[str]:
        """Return the tensors that a name can mean; an output layer that is not stored stands under its own name."""
        names = [wanted] if wanted in self.tensors else self._by_end(wanted)
        for mine, theirs in _RENAMED:
            names = names or self._by_end(wanted.replace(mine, theirs))
        if not names and self.tied and last_name(wanted) in OUTPUTS:
            return [wanted]
        return names

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape, None where the base has no such tensor."""
        return self.tensors[name][1].shape if name in self.tensors else None

    def _by_end(self, wanted: str) -> list[str]:
        """Names that differ from `wanted` only by leading components (`transformer.h.0...` is stored as `h.0...`)."""
        if wanted in self.tensors:
            return [wanted]
        return [name for name in self.tensors if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]


def read_config(base: Path) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        MissingInput: it is not there.
        DamagedArtifact: it is not a mapping.
    """
    config = read_json(base / "config.json")
    if not isinstance(config, dict):
        raise DamagedArtifact(f"{base / 'config.json'} is not a mapping")
    return config


def last_name(name: str) -> str:
    """The last name of the module that a weight belongs to."""
    return re.sub(r"\.weight\Z", "", name).rpartition(".")[2]
