"""What a merged model needs beside its weights: configuration, tokenizer, generation settings, the base's licence."""

import re
import shutil
from pathlib import Path
from typing import Any

from regraft.artifacts import pretty_json, read_json
from regraft.errors import DamagedArtifact
from regraft.export.base import INPUTS, last_name, read_config
from regraft.export.plan import Plan
from regraft.model.pin import TOKENIZER_FILES

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?$", re.IGNORECASE)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LARGEST_LICENCE = 1_000_000  # bytes


def write_companions(plan: Plan, out: Path, *, dtype: str) -> None:
    """Copy the base's tokenizer and settings into `out`, with a configuration that matches the merged weights.

    No code and no weights are copied. The configuration's type is that of the weights, and its embeddings are untied
    where the merge untied them.
    """
    config = read_config(plan.base)
    config.pop("_name_or_path", None)  # a path on the machine that saved the base
    config.pop("auto_map", None)  # it names code, and none is copied
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "hidden_size" in part)]
    if dtype != "own":
        for part in parts:
            names = [name for name in ("dtype", "torch_dtype") if name in part] or ["dtype"]
            part.update(dict.fromkeys(names, _DTYPES[dtype]))
    for part in parts:
        if plan.untied:
            part["tie_word_embeddings"] = False
        if plan.vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = plan.vocabulary
    (out / "config.json").write_bytes(pretty_json(config))
    (out / "generation_config.json").write_bytes(pretty_json(_generation(plan.base, config)))
    for path in sorted({path for pattern in TOKENIZER_FILES for path in plan.base.glob(pattern) if path.is_file()}):
        target = out / path.relative_to(plan.base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def write_tokenizer(plan: Plan, out: Path, *, tokenizer: Path | None = None) -> None:
    """Put the adapter's own tokenizer in place of the base's, if it has one (added tokens, another chat template).

    Args:
        plan: the merge.
        out: the merged folder, with the base's tokenizer.
        tokenizer: folder of another tokenizer that counts instead.

    Raises:
        DamagedArtifact: the tokenizer has tokens that the embedding has no row for.
    """
    owners = [each.folder for each in plan.adapters if any((each.folder / name).is_file() for name in _VOCABULARIES)]
    owners += [tokenizer] if tokenizer is not None else []
    if owners:
        for pattern in TOKENIZER_FILES:
            for path in out.glob(pattern):
                path.unlink()
            for path in sorted(owners[-1].glob(pattern)):
                target = out / path.relative_to(owners[-1])
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    rows = [step.target.shape[0] for step in plan.steps if last_name(step.target.name) in INPUTS]
    if rows and (out / "tokenizer.json").is_file() and (most := _largest_token(out / "tokenizer.json")) >= min(rows):
        raise DamagedArtifact(
            f"the tokenizer has a token {most}, the embedding has {min(rows)} rows: they do not belong together",
            fix="put the tokenizer that the adapter was trained with into its folder",
        )


def _largest_token(file: Path) -> int:
    content = read_json(file)
    vocabulary = content.get("model", {}).get("vocab", {})
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*numbers, *(token["id"] for token in content.get("added_tokens", []))], default=-1)


def licence_files(base: Path) -> list[Path]:
    """Return the base's licence texts, which go wherever its weights go."""
    found = [path for path in base.iterdir() if _LICENCE.match(path.name) and path.is_file()]
    return sorted(path for path in found if path.stat().st_size <= _LARGEST_LICENCE)


def licence_name(base: Path) -> str | None:
    """Return the licence that the base's model card names in its front matter, None where it has none."""
    card = base / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace")[:20_000], re.DOTALL)
    named = (
        re.search(r"^license:\s*['\"]?([A-Za-z0-9.+_-]{1,60})['\"]?\s*$", head.group(1), re.MULTILINE) if head else None
    )
    return named.group(1) if named else None


def _generation(base: Path, config: dict[str, Any]) -> Any:
    """The base's generation settings; where it has none, the special tokens of its configuration."""
    if (base / "generation_config.json").is_file():
        return read_json(base / "generation_config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
