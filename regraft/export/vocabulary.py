"""A tokenizer as GGUF holds it: which of llama.cpp's tokenizers it is, its tokens, their kinds, and what it puts around a text.

What llama.cpp would read in another way is refused: it would load it and talk gibberish. Byte-level BPE is told by the
way in which it splits text, sentencepiece's by its structure (`regraft.export.sentencepiece`).
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import ParamsError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, numbered as in GGUF (`gguf.TokenType`)."""
CONVERT = "convert the merged folder with llama.cpp's convert_hf_to_gguf.py, and compare token ids yourself"
_SPLITS = {  # what a tokenizer's first split looks like, and llama.cpp's name for it
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
_TALKS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Where is it?"}],
    [{"role": "user", "content": " spaces before\nand behind "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is it?"}],
    [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": " And now?"},
    ],
)


@dataclass(frozen=True)
class Vocabulary:
    """What is written under `tokenizer.` in a GGUF file."""

    model: str
    """llama.cpp's tokenizer: `gpt2` (byte-level BPE) or `llama` (sentencepiece's BPE with byte fallback)."""
    split: str
    """llama.cpp's name for the way in which text is split before it is merged."""
    tokens: list[str]
    """By id; rows of the embedding without a token have a name that nobody types."""
    kinds: list[int]
    """By id."""
    added: dict[int, str]
    """Tokens that are cut out of a text before anything else is done with it, by id."""
    template: str | None
    """The chat template, with a space before it where llama.cpp needs one to read the same (see `sentencepiece`)."""
    add_bos: bool
    """Whether a plain text begins with the token `bos`, where that is the same for rendered conversations."""
    merges: list[str] | None = None
    """Of byte-level BPE, the first merged first."""
    scores: list[float] | None = None
    """Of sentencepiece: what has the highest score is merged first."""
    space_first: bool | None = None
    """Of sentencepiece: whether llama.cpp puts a space before a text, and after each added token."""
    unproved: str | None = None
    """Why the structure does not prove that llama.cpp gives the same ids; then only llama.cpp can."""


def open_tokenizer(merged: Path) -> Any:
    """Load a merged folder's tokenizer as those who use the folder will; transformers may read it otherwise than its file says.

    Raises:
        ParamsError: it has no fast tokenizer, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(merged, trust_remote_code=False, local_files_only=True)
    except (ImportError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ParamsError(
            f"transformers cannot load the tokenizer in {merged}: {reason}",
            fix="put a tokenizer.json there (`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one; a "
            "tokenizer.model alone needs the package sentencepiece), or leave that form out of export.forms",
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ParamsError(f"{type(tokenizer).__name__} has no tokenizer.json", fix=CONVERT)
    return tokenizer


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Return what GGUF holds of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: rows of the embedding.

    Raises:
        ParamsError: llama.cpp has no tokenizer that gives the same ids, or it is not known which; every reason is named.
    """
    import json

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        from regraft.export.sentencepiece import read_sentencepiece

        return read_sentencepiece(tokenizer, content, size)
    split = _split(content)
    if model["type"] != "BPE" or split is None:
        why = "; llama.cpp's has no byte fallback" if model["type"] == "Unigram" and model.get("byte_fallback") else ""
        raise ParamsError(
            f"the tokenizer is a {model['type']} that splits text in a way unknown here{why}",
            fix=CONVERT,
        )
    tokens, kinds, added = tokens_by_id(content, size)
    return Vocabulary(
        model="gpt2",
        split=split,
        tokens=tokens,
        kinds=kinds,
        added=added,
        template=tokenizer.chat_template,
        add_bos=begins_with_bos(tokenizer),
        merges=[each if isinstance(each, str) else " ".join(each) for each in model["merges"]],
    )


def tokens_by_id(content: dict[str, Any], size: int) -> tuple[list[str], list[int], dict[int, str]]:
    """Return texts and kinds by id, and the added tokens; of two texts of one id the last counts."""
    tokens = {number: text for text, number in content["model"]["vocab"].items()}
    special = {each["id"]: each for each in content["added_tokens"]}
    tokens |= {number: each["content"] for number, each in special.items()}
    kinds = {number: CONTROL if each["special"] else USER_DEFINED for number, each in special.items()}
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(size)]
    found = [kinds.get(number, NORMAL) if number in tokens else UNUSED for number in range(size)]
    return texts, found, {number: each["content"] for number, each in special.items()}


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether to tell llama.cpp that texts begin with `bos`: the tokenizer puts it there, and so does the chat template.

    Programs that render the template take one of two away; a template that writes none was trained without it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return False
    return all(text.startswith(tokenizer.bos_token) for text in rendered(tokenizer))


def rendered(tokenizer: Any, content: str | None = None) -> list[str]:
    """Return conversations as the chat template renders them, those left out that it refuses; none without a template.

    Args:
        tokenizer: with or without a chat template.
        content: what a user says in the only one; without it, several of all kinds.
    """
    if not tokenizer.chat_template:
        return []
    from jinja2 import TemplateError

    found: list[str] = []
    for talk in _TALKS if content is None else ([{"role": "user", "content": content}],):
        with suppress(TemplateError, TypeError, ValueError):  # many templates have no system, or want other turns
            found.append(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    return found


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
