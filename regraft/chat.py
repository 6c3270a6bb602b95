"""Conversations as a model sees them: the chat template's text, its tokens, and which of them are learned.

The text of a conversation and of each prompt in it come from the tokenizer's own template. What the model has to write
after a prompt is the difference of two renderings (`prefix + answer + end of turn` against `prefix`), so the mask is
right for any template in which the one starts with the other; any other template is refused, never guessed at.

    learned        the answer, what the template makes the model write around it, and the token that ends the turn
    not learned    system and user turns, role headers, the line break after the end of a turn

Tokens before an answer are exactly those that the prompt alone gives: where the tokenizer would merge across that border
it is kept apart. Control tokens that somebody typed are plain text (`regraft.sealed`). A clock in a template stands
still, so that rendering is repeatable.

Tools and calls (`regraft.messages`) go to the template as it expects them; one that leaves them out is refused: the model
would learn to say nothing. A plain text goes to no template: all its tokens are learned, and the end of text after them.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

from regraft.artifacts import digest_bytes
from regraft.errors import DataError
from regraft.messages import called, has_tools, is_text
from regraft.sealed import SealedTokenizer

IGNORED = -100
"""Label of a token that is not learned."""

Message = dict[str, str]
Supervise = Literal["assistant", "last"]

_TOOL, _CALL = "probeoftool", "probeofcall"
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
_ROLE = re.compile(r"[A-Za-z][A-Za-z_]{0,31}")
# Shadows the function of that name, which asks the clock; the date is the default of Llama 3's templates.
_STILL_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One conversation up to its last answer, as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the token itself where it is learned, else `IGNORED`."""
    answers: list[tuple[int, int]]
    """First token and end of each learned answer, its end of turn included."""
    turns: list[int]
    """Index of the message behind each of `answers`."""
    text: str
    """The rendered text, sealed (see `regraft.sealed`)."""
    kept_apart: bool
    """The tokenizer would have merged the end of a prompt with the start of its answer."""

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the last answer: what the model is given when it has to write it."""
        return self.input_ids[: self.answers[-1][0]]

    def learning_all(self) -> "Rendered":
        """The same conversation with every token but the first learned, up to the end of its last answer."""
        end = self.answers[-1][1]
        rest = [IGNORED] * (len(self.input_ids) - end)
        return replace(self, labels=[IGNORED, *self.input_ids[1:end], *rest])


class Chat:
    """Renders conversations with one tokenizer; making it costs milliseconds to a second, so keep it (`open_chat`)."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self.template = (_STILL_CLOCK if "strftime_now" in template else "") + template
        question, answer = "questionq", "answera"
        probe: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = self._render([probe], generation=False)[0]
        if text.count(answer) != 1:
            raise DataError(f"the chat template writes an answer {text.count(answer)} times, expected once")
        self.sealed = SealedTokenizer(tokenizer, template + text)
        self._tail = self.sealed.seal(text[text.index(answer) + len(answer) :])
        end = self.sealed.control_at(self._tail)
        self.ending = self._tail[: end[2]] if end else ""
        """The token that ends an answer, sealed, with what the template writes between the two; maybe empty."""
        own = [self.sealed.control[end[0]]] if end else []
        eos = tokenizer.eos_token_id
        self.stop_ids = list(dict.fromkeys([*own, *([eos] if eos is not None else [])]))
        """Ids that end an answer, the template's own first; empty where there is none."""

    def encode(
        self, conversations: Sequence[Sequence[Message]], supervise: Supervise, names: Sequence[str] | None = None
    ) -> list[Rendered]:
        """Render and tokenise conversations, each up to its last answer, in one batch.

        Args:
            conversations: messages with `role` and `content`; each needs an answer (see `last_answer`).
            supervise: learn every answer, or the last one only.
            names: what an error calls each conversation.

        Raises:
            DataError: the template refuses a conversation, or does not render it so that its answers can be told.
        """
        names = names or [f"conversation {i}" for i in range(len(conversations))]
        if plain := [i for i, messages in enumerate(conversations) if is_text(messages)]:
            others = [i for i in range(len(conversations)) if i not in set(plain)]
            rendered = dict(zip(plain, self._plain([conversations[i][0]["content"] for i in plain]), strict=True))
            talks = self.encode([conversations[i] for i in others], supervise, [names[i] for i in others])
            rendered |= zip(others, talks, strict=True)
            return [rendered[i] for i in range(len(conversations))]
        wholes, parts, where = [], [], []
        for i, messages in enumerate(conversations):
            last = last_answer(messages)
            if last is None:
                raise DataError(f"{names[i]}: there is no answer to anything")
            hidden = self._hidden(messages[: last + 1], names[i])
            turns = [k for k in range(1, last + 1) if messages[k]["role"] == "assistant"]
            for k in turns if supervise == "assistant" else [last]:
                where.append((i, k))
                wholes.append(hidden[: k + 1])
                parts.append(hidden[:k])
        called = [names[i] for i, _ in where]
        closed = [self.sealed.seal(text) for text in self._render(wholes, generation=False, names=called)]
        prompts = [self.sealed.seal(text) for text in self._render(parts, generation=True, names=called)]

        texts = [""] * len(conversations)
        for (i, _), text in zip(where, closed, strict=True):
            texts[i] = text  # the last one of a conversation is the whole of it
        spans: list[list[tuple[int, int]]] = [[] for _ in conversations]
        turns_of: list[list[int]] = [[] for _ in conversations]
        for (i, k), text, prompt in zip(where, closed, prompts, strict=True):
            spans[i].append(self._span(texts[i], text, prompt, names[i], k))
            turns_of[i].append(k)
            if has_tools(conversations[i]):
                self._check_tools(conversations[i], k, self.unsealed(text[len(prompt) :]), names[i])
        return self._tokenise(texts, spans, turns_of, names)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the tokens that a model is given so that it answers each conversation (generation prompt included)."""
        names = [f"conversation {i}" for i in range(len(conversations))]
        hidden = [self._hidden(messages, name) for messages, name in zip(conversations, names, strict=True)]
        texts = [self.sealed.seal(text) for text in self._render(hidden, generation=True, names=names)]
        return [list(encoding.ids) for encoding in self.sealed.encode(texts)]

    def unsealed(self, sealed: str) -> str:
        """Return a sealed text with the spelling of its control tokens."""
        return self.sealed.unseal(sealed)

    @cached_property
    def _probe_of_tools(self) -> str:
        """A conversation that calls a tool, as the template renders it; empty where it refuses one."""
        tool = {"type": "function", "function": {"name": _TOOL, "description": "", "parameters": _NOTHING}}
        call = {"id": "probe0001", "type": "function", "function": {"name": _CALL, "arguments": {}}}
        probe: list[dict[str, Any]] = [
            {"role": "user", "content": "questionq", "tools": [tool]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found", "name": _CALL, "tool_call_id": "probe0001"},
            {"role": "assistant", "content": "answera"},
        ]
        try:
            return self._render([probe], generation=False)[0]
        except DataError:
            return ""

    def _plain(self, texts: Sequence[str]) -> list[Rendered]:
        """Return plain texts as tokens, with what the tokenizer begins and ends a document with."""
        first = self._tokenizer("x")["input_ids"][:1]
        begin = self._tokenizer.bos_token if first and first[0] == self._tokenizer.bos_token_id else ""
        end = self._tokenizer.eos_token or ""
        sealed = [self.sealed.seal(f"{begin}{self.sealed.hide(text, keep_added=False)}{end}") for text in texts]
        rendered = []
        for text, encoding in zip(sealed, self.sealed.encode(sealed), strict=True):
            ids = list(encoding.ids)
            rendered.append(Rendered(ids, [IGNORED, *ids[1:]], [(0, len(ids))], [0], text, False))
        return rendered

    def _check_tools(self, messages: Sequence[Message], turn: int, answer: str, name: str) -> None:
        """Check that the template writes tools and calls, and those of a turn into what the model has to write."""
        missing = []
        if messages[0].get("tools") and _TOOL not in self._probe_of_tools:
            missing.append("the definitions of tools")
        if any(each.get("tool_calls") for each in messages) and _CALL not in self._probe_of_tools:
            missing.append("calls")
        if any(each not in answer for each in called(messages[turn])):
            missing.append(f"the call in message {turn + 1}")
        if missing:
            raise DataError(
                f"{name}: the chat template leaves out {' and '.join(missing)}",
                fix="use a base model whose chat template knows tools, or set data.tools to null: such rows are quarantined",
            )

    def _hidden(self, messages: Sequence[Message], name: str) -> list[dict[str, Any]]:
        """Return the messages as the template gets them, with typed control tokens hidden."""
        hidden: list[dict[str, Any]] = []
        for message in messages:
            role = message["role"]
            if not _ROLE.fullmatch(role):
                raise DataError(f"{name}: found role {role[:40]!r}, expected a word such as `user` or `assistant`")
            content = self.sealed.hide(message["content"], keep_added=role == "assistant")
            hidden.append({"role": role, "content": content})
            for extra in ("tool_calls", "tools"):
                if found := message.get(extra):  # within JSON the spelling of a control token is as it is
                    hidden[-1][extra] = json.loads(self.sealed.hide(found, keep_added=extra == "tool_calls"))
            for extra in ("tool_call_id", "name"):
                if found := message.get(extra):
                    hidden[-1][extra] = self.sealed.hide(found, keep_added=False)
        return hidden

    def _render(
        self, conversations: Sequence[list[dict[str, Any]]], *, generation: bool, names: Sequence[str] | None = None
    ) -> list[str]:
        from jinja2 import TemplateError

        def apply(batch: Sequence[list[dict[str, Any]]]) -> list[str]:
            render = partial(
                self._tokenizer.apply_chat_template,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
            )
            if not any("tools" in each[0] for each in batch):
                return list(render(batch))
            texts = []
            for first, *others in batch:  # tools are of one conversation, and the tokenizer takes one list for all
                first = dict(first)
                texts.append(render([first, *others], tools=first.pop("tools", None)))
            return texts

        if not conversations:
            return []
        try:
            return apply(conversations)
        except (TemplateError, TypeError):
            refused = {}
            for i, messages in enumerate(conversations):
                try:
                    apply([messages])
                except (TemplateError, TypeError) as error:
                    refused[names[i] if names else "a plain question and answer"] = error
            some = "; ".join(f"{name}: {error}" for name, error in list(refused.items())[:3])
            raise DataError(
                f"the chat template refuses {len(refused)} of {len(conversations)} conversations: {some}",
                fix="leave out in `data` what the template cannot render (often the system message), "
                "or use a base model whose template can",
            ) from next(iter(refused.values()), None)

    def _span(self, full: str, closed: str, prompt: str, name: str, turn: int) -> tuple[int, int]:
        """Return start and end, in characters of `full`, of what the model writes in one turn."""
        if not closed.startswith(prompt) or not full.startswith(closed):
            which = "its prompt" if not closed.startswith(prompt) else "the turn as it was written"
            raise DataError(
                f"{name}: the chat template renders message {turn + 1} so that the conversation does not start with "
                f"{which}; which of its words the model has to write cannot be told",
                fix="set preprocess.supervise to `last` (the template may render earlier answers differently), "
                "or use a base model with another template",
            )
        end = len(closed) - len(self._tail)
        if not closed.endswith(self._tail) or end < len(prompt):
            raise DataError(
                f"{name}: the chat template ends message {turn + 1} with {closed[len(prompt) :][-20:]!r}, expected "
                f"{self.sealed.unseal(self._tail)!r} as after other answers",
                fix="use a base model whose template ends every answer alike",
            )
        return len(prompt), end + len(self.ending)

    def _tokenise(
        self, texts: list[str], spans: list[list[tuple[int, int]]], turns: list[list[int]], names: Sequence[str]
    ) -> list[Rendered]:
        encodings = self.sealed.encode(texts)
        answers = [
            [(_at(e, start), _at(e, end)) for start, end in each] for e, each in zip(encodings, spans, strict=True)
        ]
        headers = self._headers(texts, spans)
        ids = [list(encoding.ids) for encoding in encodings]
        merged = {}
        for i, encoding in enumerate(encodings):
            for (first, _), (start, _, header) in zip(answers[i], self._with_header(texts[i], spans[i]), strict=True):
                alone = headers[header]
                if _crossed(encoding, start) or ids[i][max(first - len(alone), 0) : first] != alone:
                    merged[i] = self._apart(texts[i], spans[i])
        for (i, (_, moved)), encoding in zip(
            merged.items(), self.sealed.encode([t for t, _ in merged.values()]), strict=True
        ):
            ids[i] = [id_ for id_ in encoding.ids if id_ != self.sealed.split_id]
            # The n-th answer follows n borders, which are taken out.
            answers[i] = [(_at(encoding, start) - n, _at(encoding, end) - n) for n, (start, end) in enumerate(moved, 1)]

        rendered = []
        for i, tokens in enumerate(ids):
            labels = [IGNORED] * len(tokens)
            for first, last in answers[i]:
                labels[first:last] = tokens[first:last]
            if not answers[i][0][0]:
                raise DataError(f"{names[i]}: the chat template writes nothing before the answer")
            rendered.append(Rendered(tokens, labels, answers[i], turns[i], texts[i], i in merged))
        return rendered

    def _with_header(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int, str]]:
        """Return the spans, each with the text from the last control token of its prompt to the prompt's end."""
        return [(start, end, text[max(self.sealed.last_control(text, start), 0) : start]) for start, end in spans]

    def _headers(self, texts: list[str], spans: list[list[tuple[int, int]]]) -> dict[str, list[int]]:
        """Return the tokens of each distinct header alone."""
        found = {h for text, each in zip(texts, spans, strict=True) for _, _, h in self._with_header(text, each)}
        headers = sorted(found)
        return {h: list(e.ids) for h, e in zip(headers, self.sealed.encode(headers), strict=True)}

    def _apart(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text with a border before each answer, and the spans in it."""
        pieces, moved, at, shift = [], [], 0, 0
        for start, end in spans:
            pieces += [text[at:start], self.sealed.split]
            at, shift = start, shift + len(self.sealed.split)
            moved.append((start + shift, end + shift))
        return "".join([*pieces, text[at:]]), moved


def _at(encoding: Any, char: int) -> int:
    """Return the index of the first token that starts at the character `char` or after it."""
    token: int | None = encoding.char_to_token(char)  # the first of those that hold it
    if token is not None:
        return token + int(encoding.token_to_chars(token)[0] < char)
    size = len(encoding)
    if size and encoding.token_to_chars(size - 1)[1] <= char:
        return size
    return bisect_left([start for start, _ in encoding.offsets], char)  # a character that has no token


def _crossed(encoding: Any, char: int) -> bool:
    """Say whether a token starts before the character `char` and holds it."""
    token = encoding.char_to_token(char)
    return token is not None and encoding.token_to_chars(token)[0] < char


def last_answer(messages: Sequence[Message]) -> int | None:
    """Return the index of the last assistant message that follows another message; None where there is none."""
    return next((k for k in range(len(messages) - 1, 0, -1) if messages[k]["role"] == "assistant"), None)


def open_chat(tokenizer: Any) -> Chat:
    """Return the `Chat` of a tokenizer and its present template; the last few are kept.

    Raises:
        DataError: the tokenizer has no chat template, is not a fast one, or its template renders no conversation.
    """
    return _chat(tokenizer, _template(tokenizer))


@lru_cache(maxsize=4)
def _chat(tokenizer: Any, template: str) -> Chat:
    return Chat(tokenizer, template)


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "the base model's tokenizer has no chat template", fix="use an instruction-tuned variant of the base model"
        ) from error


def render(
    tokenizer: Any, messages: Sequence[Message], supervise: Supervise = "assistant"
) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one conversation up to its last answer; see `Chat.encode` for many."""
    rendered = open_chat(tokenizer).encode([messages], supervise)[0]
    return rendered.input_ids, rendered.labels


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens after which a model answers `messages`; see `Chat.prompts` for many."""
    return open_chat(tokenizer).prompts([messages])[0]


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the template's end of turn first, then the tokenizer's end of text."""
    return list(open_chat(tokenizer).stop_ids)


def template_digest(tokenizer: Any) -> str:
    """Return the sha256 of the chat template's text."""
    return digest_bytes(_template(tokenizer).encode())
