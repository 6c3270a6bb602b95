"""The base's tokenizer, kept from one run to the next as what preparation asks of it.

Importing transformers takes half a second (with a tokenizer class of a model's own also torch, which takes seconds): more
than 1 % more rows. So what a tokenizer of transformers consists of is written into the cache once: the Rust tokenizer, the
chat template and a few names. `KeptTokenizer` renders and encodes with these; for anything else it loads the real one.

It is kept only if both gave the same for conversations and texts that were tried, under a digest of the tokenizer's files,
the code that loads it and the libraries; and its bytes are verified before use.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_file, digest_json, read_json
from regraft.preprocess.shards import Cache, code_digest, versions
from regraft.preprocess.template import compiled
from regraft.sealed import unknown_id

if TYPE_CHECKING:
    from regraft.model.load import Base

log = logging.getLogger("regraft.preprocess")
_FILE = "tokenizer.json"
_NAMES = ("eos_token", "eos_token_id", "bos_token", "bos_token_id", "special_tokens_map", "model_max_length")
_PLAIN = {"role", "content"}
_TRIED: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": "Where is order 17?\n "},
        {"role": "assistant", "content": '{"a": 1} \u00fc\u6f22 <b>'},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "e\u0301 c"}],
]


class KeptTokenizer:
    """Stands for a tokenizer of transformers where conversations are rendered and texts are encoded."""

    def __init__(self, content: dict[str, Any], real: Callable[[], Any]) -> None:
        """`content` is what `_content` returned of the tokenizer that `real` loads."""
        from tokenizers import Tokenizer

        self._real: Any = None
        self._load = real
        self._template: str = content["template"]
        self.__dict__.update(content["names"])
        self.chat_control_tokens: list[str] | None = content["chat_control_tokens"]
        self.unknown: int | None = content["unknown"]
        """See `regraft.sealed.unknown_id`."""
        self.added_tokens_decoder = {id_: SimpleNamespace(**token) for id_, token in content["added"]}
        self.backend_tokenizer = Tokenizer.from_str(content["rust"])
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()

    def __getattr__(self, name: str) -> Any:
        """Return what the real tokenizer has by that name."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loaded(), name)

    def get_chat_template(self) -> str:
        """Return the template that conversations are rendered by."""
        return self._template

    def compiled(self, template: str) -> Any:
        """Return a template as `apply_chat_template` uses it."""
        return compiled(template)

    def apply_chat_template(self, conversation: Any, *, chat_template: str, **given: Any) -> Any:
        """Return the texts of a batch of conversations; what is no such batch, or has tools, the real tokenizer renders."""
        simple = given.keys() == {"tokenize", "add_generation_prompt"} and not given["tokenize"]
        if not (simple and conversation and all(_is_plain(each) for each in conversation)):
            return self._loaded().apply_chat_template(conversation, chat_template=chat_template, **given)
        template = compiled(chat_template)
        fixed = {"tools": None, "documents": None, "add_generation_prompt": given["add_generation_prompt"]}
        # The template gets a copy: what it is given is the caller's.
        return [
            template.render(messages=[dict(each) for each in messages], **fixed, **self.special_tokens_map)
            for messages in conversation
        ]

    def __call__(self, text: Any, *, add_special_tokens: bool = True, **given: Any) -> Any:
        """Return `input_ids` of a list of texts as they are; anything else the real tokenizer encodes."""
        if add_special_tokens or isinstance(text, str):
            return self._loaded()(text, add_special_tokens=add_special_tokens, **given)
        encoded = self.backend_tokenizer.encode_batch(list(text), add_special_tokens=False)
        return {"input_ids": [each.ids for each in encoded]}

    def _loaded(self) -> Any:
        if self._real is None:
            self._real = self._load()
        return self._real


def open_tokenizer(base: "Base", store: Cache) -> tuple[Any, str]:
    """Return the base's tokenizer, the kept one where `store` has it, and the name of its entry there."""
    from regraft.model import load

    entry = digest_json(
        {
            "kept": base.report.tokenizer_digest,
            "code": [code_digest(), digest_file(Path(load.__file__))],
            "libraries": versions(),
        }
    )
    if (folder := store.find(entry)) is not None:
        return KeptTokenizer(read_json(folder / _FILE), lambda: load.load_tokenizer(base)), entry
    return load.load_tokenizer(base), entry


def keep_tokenizer(tokenizer: Any, store: Cache, entry: str) -> None:
    """Keep a tokenizer that `open_tokenizer` had to load, where a kept one is like it.

    Call it when all is prepared: it leaves the memory in which millions of small blocks are to come and go in pieces.
    """
    if not isinstance(tokenizer, KeptTokenizer) and (content := _content(tokenizer)) is not None:
        with store.make(entry) as folder:
            (folder / _FILE).write_text(json.dumps(content), encoding="utf-8")


def _content(tokenizer: Any) -> dict[str, Any] | None:
    """Return what a `KeptTokenizer` is made from, or None where one would not be like `tokenizer` in all that was tried."""
    try:
        content = {
            "rust": tokenizer.backend_tokenizer.to_str(),
            "template": str(tokenizer.get_chat_template()),
            "names": {name: getattr(tokenizer, name) for name in _NAMES},
            "chat_control_tokens": getattr(tokenizer, "chat_control_tokens", None),
            "unknown": unknown_id(tokenizer),
            "added": [
                (id_, {"content": token.content, "special": token.special})
                for id_, token in tokenizer.added_tokens_decoder.items()
            ],
        }
        kept = KeptTokenizer(json.loads(json.dumps(content)), lambda: None)
        return content if _tried(kept, content["template"]) == _tried(tokenizer, content["template"]) else None
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception, templates anything: then it is not kept
        log.debug("the tokenizer is not kept: %s", error)
        return None


def _tried(tokenizer: Any, template: str) -> list[Any]:
    """Return what a tokenizer makes of some conversations and texts."""
    found: list[Any] = [getattr(tokenizer, name) for name in _NAMES]
    for generation in (False, True):
        found += tokenizer.apply_chat_template(
            _TRIED, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    texts = [*found[-2:], *(token.content + " x" for token in tokenizer.added_tokens_decoder.values())]
    return [*found, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _is_plain(messages: Sequence[Any]) -> bool:
    """Say whether messages are what a template gets unchanged."""
    return isinstance(messages, list) and all(
        type(each) is dict and each.keys() == _PLAIN and type(each["content"]) is str for each in messages
    )
