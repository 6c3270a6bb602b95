"""Tokens that a base's tokenizer lacks: the tokenizer extended, and rows for them in the base's embeddings.

The stage `model` writes the extended tokenizer beside its report; everything after it tokenises with that one, and its
digest is the tokenizer's. The base's own files stay as they are: the rows are made when it is loaded, each the mean of
those that were there, and an adapter carries what was learnt of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, ParamsError

FOLDER = "tokenizer"
"""Folder of the extended tokenizer in the stage's output."""


def extend_tokenizer(weights: Path, out: Path, tokens: Sequence[str]) -> None:
    """Write a base's tokenizer with further tokens into a folder, in the format of transformers.

    The tokens are plain ones (not special): wherever their spelling stands in a text, they are one token.

    Args:
        weights: the base's folder.
        out: is made.
        tokens: their spellings, in the order of their ids.

    Raises:
        ParamsError: the tokenizer has one of them, or is not a fast one.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise ParamsError(
            f"model.new_tokens: {type(tokenizer).__name__} has no tokenizer.json that could be extended",
            fix="set model.new_tokens to [], or use a base model that has one",
        )
    vocabulary = tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    if known:
        raise ParamsError(
            f"model.new_tokens: this base's tokenizer has {', '.join(map(repr, known))} already",
            fix="name them in train.trainable_tokens instead, which trains their embeddings",
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    content = {k: v for k, v in json.loads(settings.read_bytes()).items() if k not in ("is_local", "local_files_only")}
    settings.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def new_token_ids(tokenizer: Path, tokens: Sequence[str]) -> dict[str, int]:
    """Return the ids of added tokens, from an extended tokenizer's `tokenizer.json`.

    Raises:
        DamagedArtifact: it lacks one of them.
    """
    content = read_json(tokenizer / "tokenizer.json")
    added = {each["content"]: int(each["id"]) for each in content.get("added_tokens", [])}
    missing = [token for token in tokens if token not in added]
    if missing:
        raise DamagedArtifact(f"{tokenizer / 'tokenizer.json'} lacks {', '.join(map(repr, missing))}")
    return {token: added[token] for token in tokens}


def make_room(model: Any, ids: Mapping[str, int]) -> None:
    """Give a model's embedding and output layer a row for each new token that has none, in place.

    A new row is the mean of the old ones, so that no token is likelier for it than another. Bases often have more rows
    than their tokenizer has tokens: those are used first, as they are.
    """
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    rows = max(ids.values(), default=-1) + 1
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)
        bias = getattr(ends[1], "bias", None)
        if bias is not None:
            bias[before:] = bias[:before].float().mean().to(bias.dtype)
