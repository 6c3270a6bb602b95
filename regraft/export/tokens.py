"""Whether llama.cpp splits texts as transformers does, by a GGUF file's tokenizer alone: the weights are not loaded."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from regraft.errors import DamagedArtifact, MissingInput
from regraft.export.sentencepiece import reading_of
from regraft.export.vocabulary import Vocabulary, rendered

_PIECES = (
    "Where is my lamp?", "  two  spaces ", "\n", "\t", "\r\n", "a\u00a0b", "Ünïcödé", "straße", "日本語のテキスト", "한국어", "русский текст",
    "العربية", "हिन्दी", "e\u0301", "🙂", "👩‍👩‍👧‍👦", "🇩🇪", "\u200b", "\ufeff", "\x00\x01\x7f", "\U0001d4b3", "1234567890", "3.14159e-10", "don't", "I'LL",
    "x=y+1;//", "{'a': [1, 2]}", "https://example.org/?q=1&r=%20", "aaaaaaaa", "========", "----", "________", "▁", "▁▁a", "<0x0A>",
    "[PAD5]", "ab", "<|user|>", "[INST]", "ﬁ", "½", "²", "…", "“quoted”", "CamelCaseWord", "ALLCAPS", "\\n", "def f(x):\n    return x",
)  # fmt: skip
_FAR = 400
"""Texts made of a vocabulary's own tokens, at most, and as many of tokens that overlap themselves."""


def texts(vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what is compared: scripts, spaces, bytes, pairs of these, tokens side by side, and added tokens within text."""
    yield from _PIECES
    for i, first in enumerate(_PIECES):
        yield first + _PIECES[(7 * i + 3) % len(_PIECES)]
        yield f"{_PIECES[(5 * i + 1) % len(_PIECES)]} {first} {_PIECES[(11 * i + 2) % len(_PIECES)]}"
    for text in islice(vocabulary.added.values(), 50):
        yield from (text, f"a{text}b", f" {text} ", f"{text}{text}\n{text}c")
    plain = [text.replace("▁", " ") for text in _plain(vocabulary)]
    step = max(1, len(plain) // _FAR)
    for at in range(0, len(plain) - 2 * step, step):
        yield plain[at] + plain[at + step] + plain[(3 * at + 1) % len(plain)]
    yield from islice((each.replace("▁", " ") for each in _overlapping(vocabulary)), _FAR)


def check_tokens(file: Path, tokenizer: Any, vocabulary: Vocabulary) -> int:
    """Compare ids of several hundred texts, and of conversations with each of some dozens in them; return how many were compared.

    Args:
        file: what was written.
        tokenizer: transformers' own.
        vocabulary: what was made of it.

    Raises:
        DamagedArtifact: llama.cpp gives other ids.
        MissingInput: llama.cpp is not installed, and the tokenizer's structure does not prove that it gives the same.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        if vocabulary.unproved:
            raise MissingInput(
                f"only llama.cpp can say whether it splits text by this tokenizer as transformers does "
                f"({vocabulary.unproved}), and llama-cpp-python is not installed",
                fix="make llama-cpp (it compiles for minutes), or leave the gguf forms out of export.forms",
            )
        return 0
    from regraft.export.llama import splitting

    with splitting(file) as split:
        return compare(split, tokenizer, vocabulary)


def compare(split: Callable[[str], list[int]], tokenizer: Any, vocabulary: Vocabulary) -> int:
    """Compare what `split` makes of texts with transformers' ids; return how many were compared.

    Plain texts around which llama.cpp puts other spaces by its nature get the space by hand, or are left out; conversations
    are compared as the file's own template writes them.

    Raises:
        DamagedArtifact: ids differ.
    """
    leads = [""]
    agrees: Callable[[str, str], bool] = _normal(tokenizer)
    if vocabulary.model == "llama":
        reading = reading_of(tokenizer, vocabulary)
        agrees, leads = reading.agrees, [reading.lead, "", " "]
    talks = [text for content in _PIECES for text in rendered(tokenizer, content) if agrees(text, leads[0])]
    pairs = [(leads[0], text) for text in (*rendered(tokenizer), *talks)]
    for text in texts(vocabulary):
        pairs += [(lead, text) for lead in leads if agrees(text, lead)][:1]
    wrong = [(lead, text) for lead, text in pairs if split(lead + text) != _own(tokenizer, text)]
    if wrong:
        lead, text = min(wrong, key=lambda each: len(each[1]))
        raise DamagedArtifact(
            f"llama.cpp splits {len(wrong)} of {len(pairs)} texts otherwise than transformers: {lead + text!r} is "
            f"{split(lead + text)[:12]}, expected {_own(tokenizer, text)[:12]}",
            fix="leave the gguf forms out of export.forms, and please report the tokenizer",
        )
    return len(pairs)


def texts_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the texts that a prompt's ids can have been made of: a space before a piece may be its own or the tokenizer's."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    added = tokenizer.added_tokens_decoder
    pieces = [list(piece) for _, piece in groupby(ids, key=lambda each: each if each in added else None)]
    texts = dict.fromkeys((decode(ids), "".join(decode(piece) for piece in pieces)))
    return [text for text in texts if list(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids]


def _normal(tokenizer: Any) -> Callable[[str, str], bool]:
    """Tell which texts a byte-level tokenizer takes as they are: llama.cpp composes no characters, Qwen's tokenizer does."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return lambda text, _: normalizer is None or normalizer.normalize_str(text) == text


def _own(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(vocabulary: Vocabulary) -> list[str]:
    return [text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == 1]


def _overlapping(vocabulary: Vocabulary) -> Iterable[str]:
    """Yield texts in which a token occurs twice, one over the other: the one case where order within a token's merges counts."""
    known = set(_plain(vocabulary))
    for text in sorted(known):
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in known and right in known and text.startswith(right) and text[len(right) :] in known:
                yield left + text
                yield f"x{left}{text}y"
