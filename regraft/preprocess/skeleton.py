"""What a chat template writes around the words of a conversation, learned once for each sequence of roles.

Rendering a conversation through Jinja twice and asking for the offset of every token costs more than tokenising it. Where
a template only puts the words between fixed pieces, the text of a conversation is those pieces and its words, and the
place of an answer follows from the place of its control tokens. Whether a template is like that is observed, not assumed:
the words of a probe are strings that note what is done with them (`_Watched`). What a template looks for in the words
(`</think>` in Qwen 3's) is remembered: a conversation that holds it goes through the template itself, as does every one
that begins or ends with white space, holds a control token, or whose tokens do not lie as expected (`columns.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from regraft.chat import Chat, Message, Rendered, Supervise
from regraft.errors import DataError
from regraft.preprocess.audit import unknown_of
from regraft.preprocess.tokenizer import KeptTokenizer

_WORD = "qzw{:03}wzq"  # stands for the words of a turn in the probe
_LONGEST = 64  # turns; longer conversations are few
_UNFORESEEN = ""


@dataclass(frozen=True)
class Answer:
    """Where an answer lies in any conversation of one sequence of roles; offsets in UTF-8 bytes of the sealed text."""

    turn: int
    before: int
    """Bytes of the pieces before what the model writes."""
    length: int
    """Bytes that the model writes besides the words of the turn: what leads to them, and the ending."""
    header: tuple[int, ...]
    """The tokens from the last control token of the prompt to its end."""
    header_at: int
    """Which control token of the conversation the header starts with, from 0."""
    end_at: int
    """Which control token ends the answer."""


@dataclass(frozen=True)
class Skeleton:
    """The pieces around the words of one sequence of roles."""

    pieces: tuple[str, ...]
    """Sealed text; one more than there are turns."""
    answers: tuple[Answer, ...]
    controls: int
    """Control tokens in all, each of them the template's."""

    def text(self, words: Sequence[str]) -> str:
        """Return the sealed text of a conversation."""
        parts = self._gaps.copy()
        parts[1::2] = words
        return "".join(parts)

    @cached_property
    def _gaps(self) -> list[str]:
        return [part for piece in self.pieces for part in (piece, "")][:-1]

    @cached_property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(len(piece.encode()) for piece in self.pieces)


class Skeletons:
    """The skeletons of one tokenizer and template, made when a sequence of roles is first seen."""

    def __init__(self, chat: Chat, tokenizer: Any, supervise: Supervise) -> None:
        self._chat = chat
        self._supervise: Supervise = supervise
        self._known: dict[tuple[str, ...], tuple[Skeleton, frozenset[str]] | None] = {}
        self.table = byte_table(chat.sealed.rust)
        """Bytes of each token, where tokens are bytes; None: every conversation goes through the template."""
        self._render = None if self.table is None else _renderer(tokenizer, chat.template)
        self.control = set(chat.sealed.control.values())
        self.unknown = unknown_of(tokenizer)

    def refuse(self) -> None:
        """From now on let every conversation go through the template."""
        self._render = self.table = None
        self._known.clear()

    def of(self, roles: tuple[str, ...]) -> tuple[Skeleton, frozenset[str]] | None:
        """Return the skeleton of conversations with these roles, the last one an answer, or None where there is none.

        With it comes what the template looks for in their words: one that holds any of it is not of this form.
        """
        if roles not in self._known:
            if len(self._known) > 1_000:
                self._known.clear()
            self._known[roles] = self._probe(roles)
        return self._known[roles]

    def _probe(self, roles: tuple[str, ...]) -> tuple[Skeleton, frozenset[str]] | None:
        if self._render is None or len(roles) > _LONGEST:
            return None
        words = [_WORD.format(k) for k in range(len(roles))]
        needles: set[str] = set()
        for k in range(1, len(roles) + 1):  # each prefix is rendered as a prompt, and the whole as it is
            some: list[dict[str, str]] = [
                {"role": role, "content": _Watched.of(word, needles)}
                for role, word in zip(roles[:k], words[:k], strict=True)
            ]
            try:
                self._render(some, k < len(roles))
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
                return None  # said with the row's name when a row of this kind is rendered
        messages: list[Message] = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        try:
            rendered = self._chat.encode([messages], self._supervise)[0]
        except DataError:
            return None
        if _UNFORESEEN in needles or rendered.kept_apart or any(rendered.text.count(word) != 1 for word in words):
            return None
        pieces, rest = [], rendered.text
        for word in words:
            piece, found, rest = rest.partition(word)
            if not found:
                return None
            pieces.append(piece)
        skeleton = self._measured((*pieces, rest), words, rendered)
        return None if skeleton is None else (skeleton, frozenset(needles))

    def _measured(self, pieces: tuple[str, ...], words: Sequence[str], rendered: Rendered) -> Skeleton | None:
        assert self.table is not None
        sizes = [len(self.table[id_]) for id_ in rendered.input_ids]
        offsets = [0, *accumulate(sizes)]
        if b"".join(self.table[id_] for id_ in rendered.input_ids) != rendered.text.encode():
            return None
        controls = [i for i, id_ in enumerate(rendered.input_ids) if id_ in self.control]
        starts = [rendered.text.encode().index(word.encode()) for word in words]
        answers = []
        for turn, (first, end) in zip(rendered.turns, rendered.answers, strict=True):
            led = [i for i, at in enumerate(controls) if at < first]
            word_before = starts[turn - 1] + len(words[turn - 1])
            if not led or end - 1 not in controls or not word_before <= offsets[controls[led[-1]]]:
                return None
            if not offsets[first] <= starts[turn] <= offsets[end] - len(words[turn]):
                return None
            answers.append(
                Answer(
                    turn=turn,
                    before=offsets[first] - sum(map(len, words[:turn])),
                    length=offsets[end] - offsets[first] - len(words[turn]),
                    header=tuple(rendered.input_ids[controls[led[-1]] : first]),
                    header_at=led[-1],
                    end_at=controls.index(end - 1),
                )
            )
        return Skeleton(pieces, tuple(answers), len(controls))


@lru_cache(maxsize=2)
def byte_table(rust: Any) -> list[bytes] | None:
    """Return the bytes that each token stands for, by id, or None where tokens are no bytes of the text as it stands.

    They are with byte-level models (GPT-2's alphabet of printable characters for bytes) without a normalizer, or with one
    that only composes (NFC).
    """
    # Part by part: the whole as JSON holds the vocabulary and all merges.
    normalizer, decoder, pre_tokenizer = (
        json.loads(part.__getstate__()) if part is not None else {}
        for part in (rust.normalizer, rust.decoder, rust.pre_tokenizer)
    )
    if decoder.get("type") != "ByteLevel" or normalizer.get("type", "NFC") != "NFC":
        return None
    if any(each.get("add_prefix_space") for each in _parts(pre_tokenizer)):
        return None
    letters = _letters()
    added = {id_: token.content for id_, token in rust.get_added_tokens_decoder().items()}
    known = rust.get_vocab(with_added_tokens=True)
    spelled = [""] * (max(known.values()) + 1)
    for text, id_ in known.items():
        if id_ not in added:
            spelled[id_] = text
    together = "".join(spelled)
    if not letters.keys() >= set(together):
        return None
    # One translation of the whole vocabulary: a letter is a byte, so lengths stay.
    flat = together.translate({ord(letter): byte for letter, byte in letters.items()}).encode("latin-1")
    ends = list(accumulate(map(len, spelled)))
    table = [flat[end - len(text) : end] for text, end in zip(spelled, ends, strict=True)]
    for id_, text in added.items():
        table[id_] = text.encode()
    return table


def _parts(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]


def _letters() -> dict[str, int]:
    """Return GPT-2's letter for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _renderer(tokenizer: Any, template: str) -> Callable[[list[dict[str, str]], bool], str] | None:
    """Return the template as a function that leaves the strings it is given as they are."""
    if isinstance(tokenizer, KeptTokenizer):
        compiled = tokenizer.compiled(template)
    else:
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template
        except ImportError:  # it is not part of the public interface: without it everything goes through the template
            return None
        compiled = _compile_jinja_template(template)
    special = tokenizer.special_tokens_map

    def render(messages: list[dict[str, str]], generation: bool) -> str:
        given = {"messages": messages, "add_generation_prompt": generation, "tools": None, "documents": None}
        return str(compiled.render(**given, **special))

    return render


class _Watched(str):
    """A string that notes what is looked for in it, and whether anything is done with it that depends on more."""

    _needles: set[str]
    __hash__ = str.__hash__

    @classmethod
    def of(cls, text: str, needles: set[str]) -> "_Watched":
        made = cls(text)
        made._needles = needles
        return made

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True  # empty words go through the template

    def __add__(self, other: str) -> str:
        return _mixed(str.__add__(self, other), self._needles)

    def __radd__(self, other: str) -> str:
        return _mixed(str.__add__(other, self), self._needles)


class _Mixed(_Watched):
    """Words joined with others: looking into it, even for white space at its ends, is not foreseen."""


def _mixed(text: str, needles: set[str]) -> "_Mixed":
    made = _Mixed(text)
    made._needles = needles
    return made


def _stripping(name: str) -> Callable[..., str]:
    def strip(self: _Watched, chars: str | None = None) -> str:
        if chars is not None and chars.strip():
            self._needles.add(_UNFORESEEN)
        return _Watched.of(getattr(str, name)(self, chars), self._needles)

    return strip


def _looking(name: str) -> Callable[..., Any]:
    def look(self: _Watched, needle: Any = None, *more: Any) -> Any:
        if isinstance(needle, str) and needle:
            self._needles.add(needle)
        elif name not in ("__eq__", "__ne__"):  # a comparison with nothing or with a number tells nothing of the words
            self._needles.add(_UNFORESEEN)
        found = getattr(str, name)(self, *(() if needle is None and name.endswith("split") else (needle,)), *more)
        return _rewatched(found, self._needles)

    return look


def _rewatched(found: Any, needles: set[str]) -> Any:
    if isinstance(found, str):
        return _Watched.of(found, needles) if found else found
    if isinstance(found, list | tuple):
        return type(found)(_rewatched(each, needles) for each in found)
    return found


def _unforeseen(name: str) -> Callable[..., Any]:
    def do(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        self._needles.add(_UNFORESEEN)
        return getattr(str, name)(self, *args, **kwargs)

    return do


_LOOKING = [
    "__contains__",
    "__eq__",
    "__ne__",
    "startswith",
    "endswith",
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "replace",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
    "removeprefix",
    "removesuffix",
]
_AS_IT_IS = [
    "__new__",
    "__init__",
    "__class__",
    "__getattribute__",
    "__hash__",
    "__doc__",
    "__str__",
    "__bool__",
    "__add__",
    "__reduce__",
    "__reduce_ex__",
    "__init_subclass__",
    "__subclasshook__",
    "__getnewargs__",
    "__setattr__",
    "__delattr__",
    "__dir__",
    "__sizeof__",
    "__repr__",
    "__getstate__",
]
for _name in dir(str):
    if _name in ("strip", "lstrip", "rstrip"):
        setattr(_Watched, _name, _stripping(_name))
    elif _name in _LOOKING:
        setattr(_Watched, _name, _looking(_name))
    elif _name not in _AS_IT_IS and callable(getattr(str, _name)):
        setattr(_Watched, _name, _unforeseen(_name))
    if _name not in _AS_IT_IS and callable(getattr(str, _name)):
        setattr(_Mixed, _name, _unforeseen(_name))
