"""A copy of a tokenizer whose control tokens cannot be typed.

A fast tokenizer finds `<|im_end|>` wherever it stands, in a customer's text too, and makes it the token that ends a turn.
The copy here knows its control tokens under secret names only, drawn anew in every process, under the same ids. So a
text is encoded whole, in batches, by the same Rust code: the control tokens that the template wrote are renamed first
(`seal`), those that somebody typed keep their spelling and become plain text.

The special tokens are also taken out of the model's vocabulary, where a Unigram model or `ignore_merges` would find them.
"""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from regraft.errors import DataError


class SealedTokenizer:
    """See the module; `template_text` is what decides which added tokens besides the special ones are control tokens."""

    def __init__(self, tokenizer: Any, template_text: str) -> None:
        """Copy a fast tokenizer of transformers.

        Raises:
            DataError: it has no Rust tokenizer that can be copied, or the copy's ids differ.
        """
        self.control, self.special = _control_tokens(tokenizer, template_text)
        secret = secrets.token_hex(8)
        self._prefix, self._mark = f"<c{secret}", f"<t{secret}"
        self._name = {text: f"{self._prefix}-{i}>" for i, text in enumerate(self.control)}
        self._text = {name: text for text, name in self._name.items()}
        self._marks = {text: f"{self._mark}-{i}>" for i, text in enumerate(self.control)}
        self._typed = {mark: text for text, mark in self._marks.items()}
        self._any = _pattern(self.control)
        self._any_special = _pattern(self.special)
        self._names = _pattern(self._text)
        self.rust = _renamed(tokenizer, self._name, self.control)
        self.split = f"{self._prefix}-split>"
        self.split_id = _add_split(self.rust, self.split)

    def hide(self, text: str, *, keep_added: bool) -> str:
        """Replace control tokens in somebody's words by marks that a template passes through.

        `keep_added` leaves those that are added tokens but not special: an answer may hold `<tool_call>`.
        """
        return (self._any_special if keep_added else self._any).sub(lambda found: self._marks[found[0]], text)

    def holds_control(self, text: str) -> bool:
        """Say whether somebody's words hold the spelling of a control token, or what the secret names are made of."""
        return self._any.search(text) is not None

    def seal(self, rendered: str) -> str:
        """Rename the control tokens that the template wrote, and put back the words that `hide` took out."""
        sealed = self._any.sub(lambda found: self._name[found[0]], rendered)
        if self._mark not in sealed:
            return sealed
        for mark, text in self._typed.items():
            sealed = sealed.replace(mark, text)
        return sealed

    def unseal(self, sealed: str) -> str:
        """Give the control tokens of a sealed text their spelling again."""
        return self._names.sub(lambda found: self._text[found[0]], sealed)

    def control_at(self, sealed: str, start: int = 0) -> tuple[str, int, int] | None:
        """Return (spelling, start, end) of the first control token of a sealed text at or after `start`."""
        found = self._names.search(sealed, start)
        return None if found is None else (self._text[found[0]], found.start(), found.end())

    def last_control(self, sealed: str, end: int) -> int:
        """Return where the last control token before `end` starts in a sealed text, or -1."""
        return sealed.rfind(self._prefix, 0, end)

    def count(self, sealed: str, control_id: int) -> int:
        """Return how often the template wrote a control token in a sealed text (0 for an id that is not one)."""
        return sum(sealed.count(self._name[text]) for text, id_ in self.control.items() if id_ == control_id)

    def encode(self, sealed: Sequence[str]) -> list[Any]:
        """Encode sealed texts in one batch; each encoding has `ids` and `offsets` into its text."""
        return list(self.rust.encode_batch(list(sealed), add_special_tokens=False))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Decode to sealed texts in one batch."""
        return list(self.rust.decode_batch([list(each) for each in ids], skip_special_tokens=False))


def _control_tokens(tokenizer: Any, template_text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the control tokens and, of these, the special ones, as text to id.

    A control token is one declared special, or an added one that the template writes (DeepSeek's token for
    the user is not special). Added words and white space, which templates hold as ordinary text, are not.
    """
    declared = getattr(tokenizer, "chat_control_tokens", None)
    control, special = {}, {}
    for id_, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = token.content
        markup = any(not char.isalnum() and not char.isspace() for char in text)
        if token.special:
            special[text] = id_
        if token.special or (text in declared if declared is not None else markup and text in template_text):
            control[text] = id_
    return control, special


def _pattern(texts: Sequence[str] | dict[str, Any]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) matches nowhere


def _renamed(tokenizer: Any, names: dict[str, str], control: dict[str, int]) -> Any:
    """Return a Rust tokenizer like that of `tokenizer`, in which control tokens go by `names`."""
    from tokenizers import Tokenizer

    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: typed control tokens and offsets need one",
            fix="use a base model that has a tokenizer.json",
        )
    try:
        content = json.loads(rust.to_str())
    except Exception as error:  # the binding raises plain Exception for parts written in Python
        raise DataError(
            f"the tokenizer cannot be copied: {error}", fix="use a tokenizer without custom parts"
        ) from error

    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    # A post-processor adds tokens that the template writes itself, and ByteLevel's cuts the blanks off the offsets.
    content["post_processor"] = content["padding"] = content["truncation"] = None
    copy = Tokenizer.from_str(json.dumps(content))

    wrong = [text for text, id_ in control.items() if copy.token_to_id(names[text]) != id_]
    if wrong or copy.get_vocab_size() != rust.get_vocab_size():
        raise DataError(f"the tokenizer cannot be copied: the ids of {wrong[:5] or 'its vocabulary'} differ")
    return copy


def _add_split(rust: Any, name: str) -> int:
    """Add a token that stands for nothing but a border; its id is taken out of every encoding."""
    from tokenizers import AddedToken

    rust.add_special_tokens([AddedToken(name, normalized=False)])
    return int(rust.token_to_id(name))


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id that the model gives to text it does not know; None where every text has tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    text = model.get("unk_token")
    return None if text is None else int(tokenizer.backend_tokenizer.token_to_id(text))
