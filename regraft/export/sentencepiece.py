"""Sentencepiece's BPE with byte fallback (Llama 2, Mistral, TinyLlama, Gemma) as llama.cpp's tokenizer `llama`.

tokenizers merges the pair that comes first in a list; llama.cpp (`llm_tokenizer_spm` in `src/llama-vocab.cpp`) merges
the pair whose text has the highest score, of equal ones the leftmost, whether or not the pair is in any list. Both do
the same where the list has every pair that makes a token, and all pairs of a token side by side: what transformers
writes when it converts a `tokenizer.model`. A token's score is then minus its place in the list, which
`LlamaHfVocab` of llama.cpp's own converter leaves out (it writes -1000 for all, and every text is split otherwise).

llama.cpp puts a space before a text and after each special token, or never; tokenizers has four ways (`_Around`).
Where the two differ, the one that reads rendered conversations right is taken.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from regraft.errors import ParamsError
from regraft.export.vocabulary import (
    BYTE,
    CONTROL,
    CONVERT,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    begins_with_bos,
    rendered,
    tokens_by_id,
)

SPACE = "▁"
TEMPLATE_SPACE = "{{ ' ' }}"
"""What a chat template begins with in a file whose conversations need a space that llama.cpp does not put there."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SHOWN = 3
Pair = tuple[str, str]


@dataclass(frozen=True)
class _Around:
    """What a tokenizer does with the spaces of a text, once added tokens are cut out of it."""

    prefix: Literal["each", "each but spaces", "first", "never"]
    """Which pieces of a text get a space before them: all; all that do not begin with one; the text's first, unless it
    begins with one; none."""
    splits: bool
    """Whether nothing is merged across the beginning of a word."""

    def pieces(self, text: str, added: "re.Pattern[str]") -> list[str]:
        """Return what is merged, piece by piece, and the added tokens between."""
        found = []
        for start, piece, is_added in _cut(text, added):
            begins = piece.startswith((" ", SPACE))
            wanted = {"each": True, "each but spaces": not begins, "first": start == 0 and not begins, "never": False}
            found.append(piece if is_added else (SPACE * wanted[self.prefix] + piece).replace(" ", SPACE))
        return found


@dataclass
class Reading:
    """How llama.cpp reads a text with `space_first`, against how the tokenizer does."""

    around: _Around
    own: "re.Pattern[str]"
    """Tokens that the tokenizer cuts out of a text."""
    added: "re.Pattern[str]"
    """Those that llama.cpp cuts out."""
    space_first: bool
    lead: str = ""
    """What has to be put before a text for llama.cpp."""

    def agrees(self, text: str, lead: str) -> bool:
        """Whether both merge the same pieces of a text, where llama.cpp gets it with `lead` before it."""
        mine = self.around.pieces(text, self.own)
        theirs = _Around("each" if self.space_first else "never", False).pieces(lead + text, self.added)
        return mine == theirs


def read_sentencepiece(tokenizer: Any, content: dict[str, Any], size: int) -> Vocabulary:
    """Return what GGUF holds of a sentencepiece tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        content: its `tokenizer.json`, as transformers has it in memory.
        size: rows of the embedding.

    Raises:
        ParamsError: llama.cpp would give other ids; every reason is named.
    """
    model = content["model"]
    merges: list[Pair] = [tuple(each.split(" ", 1) if isinstance(each, str) else each) for each in model["merges"]]
    by_id, kinds, added = _tokens(content, size, {left + right for left, right in merges})
    around, problems = _around(content)
    problems += _unfit(content, by_id)
    problems += _wrong_merges(merges, by_id, kinds, splits=around.splits)
    reading = None if problems else _reading(tokenizer, around, _own(content), _pattern(added.values()))
    if reading is None and not problems:
        problems = ["llama.cpp puts spaces before other pieces of rendered conversations than the tokenizer does"]
    if problems or reading is None:
        raise ParamsError(
            "llama.cpp would read the tokenizer otherwise than transformers: " + "; ".join(problems), fix=CONVERT
        )
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama",
        split="default",
        tokens=by_id,
        kinds=kinds,
        added=added,
        template=TEMPLATE_SPACE + template if template and reading.lead else template,
        add_bos=begins_with_bos(tokenizer),
        scores=_scores(merges, by_id, kinds),
        space_first=reading.space_first,
        unproved=_unproved(merges),
    )


def reading_of(tokenizer: Any, vocabulary: Vocabulary) -> Reading:
    """Return how llama.cpp reads texts by a vocabulary that `read_sentencepiece` made of a tokenizer."""
    import json

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    around, _ = _around(content)
    lead = " " if (vocabulary.template or "").startswith(TEMPLATE_SPACE) else ""
    own, added = _own(content), _pattern(vocabulary.added.values())
    return Reading(around, own, added, bool(vocabulary.space_first), lead)


def _tokens(content: dict[str, Any], size: int, merged: set[str]) -> tuple[list[str], list[int], dict[int, str]]:
    """Return texts and kinds by id, and the tokens that are cut out of a text."""
    texts, kinds, added = tokens_by_id(content, size)
    for text, number in _bytes(content["model"]["vocab"]).items():
        if number not in added and number < size:
            texts[number], kinds[number] = text, BYTE
    unknown = content["model"].get("unk_token")
    for number, text in added.items():
        if text == unknown:
            kinds[number] = UNKNOWN
        elif kinds[number] == USER_DEFINED and SPACE in text and text in merged:
            kinds[number] = NORMAL  # Gemma's runs of spaces: merged out of spaces, and written as spaces again
    return texts, kinds, {number: text for number, text in added.items() if kinds[number] != NORMAL}


def _bytes(vocabulary: dict[str, int]) -> dict[str, int]:
    """Return the token of each byte. Gemma's tabulator has two names and one id; either may be the one that was saved."""
    named = {byte: vocabulary[byte] for byte in _BYTES if byte in vocabulary}
    typed = {_BYTES[code]: vocabulary[chr(code)] for code in range(128) if chr(code) in vocabulary}
    return {byte: typed[byte] for byte in _BYTES if byte in typed and byte not in named} | named


def _around(content: dict[str, Any]) -> tuple[_Around, list[str]]:
    """Read what is done with spaces; what is unknown here is named."""
    normalizer, before = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    seen = {each["type"]: each for each in steps}
    replaces = seen.get("Replace", {"pattern": {"String": " "}, "content": SPACE})
    prepends = seen.get("Prepend", {"prepend": SPACE})
    problems = []
    if (
        set(seen) - {"Replace", "Prepend"}
        or len(seen) != len(steps)
        or (replaces["pattern"], replaces["content"], prepends["prepend"]) != ({"String": " "}, SPACE, SPACE)
        or ("Prepend" in seen and "Replace" not in seen)
    ):
        problems.append(f"its normalizer ({', '.join(each['type'] for each in steps)}) changes more than spaces")
    if not before or (before["type"] == "Split" and before["pattern"] == {"String": " "} and "Replace" in seen):
        if "Replace" not in seen:
            problems.append(f"it leaves spaces as they are, llama.cpp writes {SPACE}")
        return _Around("each" if "Prepend" in seen else "never", False), problems
    if before["type"] == "Metaspace" and before.get("replacement") == SPACE and not steps:
        scheme = before.get("prepend_scheme", "always")
        prefixes: dict[str, Literal["each but spaces", "first", "never"]] = {
            "always": "each but spaces",
            "first": "first",
            "never": "never",
        }
        return _Around(prefixes[scheme], bool(before.get("split", True))), problems
    problems.append(f"its pre-tokenizer ({before['type']}) splits text before it is merged")
    return _Around("never", False), problems


def _unfit(content: dict[str, Any], tokens: list[str]) -> list[str]:
    """Name what of a tokenizer llama.cpp has no counterpart for, merges and spaces aside."""
    model, problems = content["model"], []
    held = _bytes(model["vocab"])
    if missing := [byte for byte in _BYTES if byte not in held]:
        problems.append(f"{len(missing)} of 256 bytes have no token ({missing[0]}), llama.cpp would end there")
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    problems += [f"{name} is {model[name]!r}" for name in settings if model.get(name)]
    if len(set(tokens)) < len(tokens):
        problems.append(f"{len(tokens) - len(set(tokens))} tokens have the text of another one")
    normalizers = {each["type"] for each in _steps(content.get("normalizer"))}
    for each in content["added_tokens"]:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if each.get(name)]
        if each.get("normalized") and normalizers and ("Prepend" in normalizers or " " in each["content"]):
            flags.append("normalized")
        problems += [f"the added token {each['content']!r} is {' and '.join(flags)}"] if flags else []
    over = [each["content"] for each in content["added_tokens"] if each["id"] >= len(tokens)]
    problems += [f"the embedding has no row for {over[0]!r}"] if over else []
    return problems


def _wrong_merges(merges: list[Pair], tokens: list[str], kinds: list[int], *, splits: bool) -> list[str]:
    """Name tokens that llama.cpp would merge out of parts which the tokenizer does not merge."""
    listed, known = set(merges), set(tokens)
    free, crossing = [], []
    for text, kind in zip(tokens, kinds, strict=True):
        if len(text) < 2 or not (kind == NORMAL or (kind == USER_DEFINED and SPACE in text)):
            continue
        if splits and SPACE in text[1:]:
            crossing.append(text)
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if (left, right) in listed:
                continue
            if (at == 1 or left in known) and (at == len(text) - 1 or right in known):
                free.append(f"{left!r} and {right!r}")
                break
    problems = []
    if free:
        problems.append(
            f"llama.cpp merges any two parts of a token, and {len(free)} tokens have parts that no merge names (as "
            f"{', '.join(free[:_SHOWN])})"
        )
    if crossing:
        problems.append(f"it splits text into words, and {len(crossing)} tokens reach over one ({crossing[0]!r})")
    if of_bytes := [pair for pair in merges if pair[0] in _BYTES or pair[1] in _BYTES]:
        problems.append(f"it merges bytes ({of_bytes[0][0]} and {of_bytes[0][1]})")
    return problems


def _scores(merges: list[Pair], tokens: list[str], kinds: list[int]) -> list[float]:
    """Return minus the place of a token's first merge; what no merge makes comes after all that one does."""
    places: dict[str, int] = {}
    for left, right in merges:
        places.setdefault(left + right, len(places))
    last = float(len(places))
    return [
        0.0 if kind in (BYTE, CONTROL, UNKNOWN) else -float(places.get(text, last))
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _unproved(merges: list[Pair]) -> str | None:
    """Say whether merges of one token stand apart: llama.cpp has one score for all of them."""
    made = [left + right for left, right in merges]
    runs = [text for text, after in pairwise([*made, ""]) if text != after]
    apart = len(runs) - len(set(runs))
    return f"merges of {apart} tokens stand apart in its list" if apart else None


def _reading(tokenizer: Any, around: _Around, own: "re.Pattern[str]", added: "re.Pattern[str]") -> Reading | None:
    """Find what lets llama.cpp read rendered conversations as the tokenizer does; for a base model, plain texts."""
    texts = rendered(tokenizer) or ["a plain text"]
    choices = [(around.prefix != "never", ""), (False, ""), *([(False, " ")] if tokenizer.chat_template else [])]
    for space_first, lead in choices:
        reading = Reading(around, own, added, space_first, lead)
        if all(reading.agrees(text, lead) for text in texts):
            return reading
    return None


def _own(content: dict[str, Any]) -> "re.Pattern[str]":
    return _pattern(each["content"] for each in content["added_tokens"])


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if part is None else list(part.get("normalizers", [part]))


def _pattern(added: Iterable[str]) -> "re.Pattern[str]":
    """Match the leftmost added token, of several there the longest."""
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")


def _cut(text: str, added: "re.Pattern[str]") -> list[tuple[int, str, bool]]:
    """Cut the added tokens out of a text: where each piece begins, the piece, and whether it is one of them."""
    found, at = [], 0
    for match in added.finditer(text):
        found += [(at, text[at : match.start()], False)] if match.start() > at else []
        found.append((match.start(), match.group(), True))
        at = match.end()
    return found + ([(at, text[at:], False)] if at < len(text) else [])
