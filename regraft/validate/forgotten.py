"""What is never trained on again: `data/forget.jsonl`, a list of salted hashes, so that nothing private is kept in it.

The first line is {"salt": ..., "shape": ...}; each other one {"content": ...} or {"id": ...}, or, where rows were read in another way from
then on, {"shape": ...}. A content is all that is said in a row, with
letter case and spacing folded, so that a row that comes again in another file, or with other columns, stays forgotten.
Hashes of short texts can be found by trying texts: the list is no place for a secret, but it does not tell one.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from regraft.artifacts import digest_bytes, digest_json, write_file
from regraft.errors import DamagedArtifact, MissingInput, PinMismatch
from regraft.messages import words
from regraft.validate.params import DataParams

FORGET = "data/forget.jsonl"
Kind = Literal["content", "id"]
_SHAPE = ("layout", "turns", "prompt", "answer", "system", "tools")


@dataclass(frozen=True)
class Forgotten:
    """The list, read."""

    salt: str
    lines: tuple[tuple[str, str], ...] = ()
    """Kind and hash of each entry, in the order of the file, which only grows."""
    begun: str | None = None
    """How rows were read when the list was begun; None for a list that does not say it."""

    @property
    def shape(self) -> str | None:
        """How rows were read when something was forgotten last: `shape_of`."""
        return next((value for kind, value in reversed(self.lines) if kind == "shape"), self.begun)

    @cached_property
    def entries(self) -> frozenset[tuple[str, str]]:
        """Kind and hash of each entry."""
        return frozenset(self.lines)

    def holds(
        self, messages: Sequence[Mapping[str, str]] | None, identity: str | None, rejected: str | None = None
    ) -> bool:
        """Say whether a row is on the list, by its content (of a pair: with either answer) or its id."""
        if identity is not None and ("id", self.of_id(identity)) in self.entries:
            return True
        return messages is not None and any(
            ("content", each) in self.entries for each in self.contents_of(messages, rejected)
        )

    def contents_of(self, messages: Sequence[Mapping[str, str]], rejected: str | None = None) -> list[str]:
        """Return the hashes of a row's content: of a pair two, since either answer may come back by itself."""
        found = [self.of_content(messages)]
        if rejected is not None:
            found.append(self.of_content([*messages[:-1], {"role": "assistant", "content": rejected}]))
        return found

    def of_content(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the hash of a row's content."""
        said = "\n".join(f"{each['role']}: {' '.join(words(each).casefold().split())}" for each in messages)
        return self._hash(f"content {said}")

    def of_id(self, identity: str) -> str:
        """Return the hash of a row's own name."""
        return self._hash(f"id {identity}")

    def _hash(self, text: str) -> str:
        return hashlib.sha256(f"{self.salt} {text}".encode("utf-8", "surrogatepass")).hexdigest()

    def adding(self, entries: Iterable[tuple[Kind, str]], shape: str | None = None) -> "Forgotten":
        """Return the list with more entries, and with how rows are read now, where that is another way."""
        changed = (("shape", shape),) if shape not in (None, self.shape) else ()
        more = sorted(set(entries) - self.entries)
        return Forgotten(self.salt, (*self.lines, *((k, v) for k, v in changed if v is not None), *more), self.begun)

    def save(self, path: Path) -> str:
        """Write the list and return its sha256."""
        first = {"salt": self.salt} if self.begun is None else {"salt": self.salt, "shape": self.begun}
        content = "".join(json.dumps(line) + "\n" for line in [first, *({kind: value} for kind, value in self.lines)])
        write_file(path, content.encode())
        return digest_bytes(content.encode())


def fresh(shape: str | None = None) -> Forgotten:
    """Return an empty list with a salt of its own."""
    return Forgotten(secrets.token_hex(16), begun=shape)


def shape_of(data: DataParams) -> str:
    """Return a digest of what turns a record into a conversation: with another one, no content on the list matches any more."""
    sources = {
        name: {"path": each.path, **{field: getattr(data.of_source(name), field) for field in _SHAPE}}
        for name, each in data.sources.items()
    }
    return digest_json({**{field: getattr(data, field) for field in _SHAPE}, "sources": sources})


def load(path: Path, digest: str | None, *, grown: bool = False, shape: str | None = None) -> Forgotten | None:
    """Read the list that `data.forget` names; None where it names none.

    Args:
        path: the list.
        digest: its sha256.
        grown: also take a list that begins with the one named: somebody was killed between writing the two.
        shape: how rows are read, where contents are to be compared.

    Raises:
        MissingInput: it is not there.
        PinMismatch: it is another one: a list that shrank would train again on what was to be forgotten; or it is of rows that were read in another way.
        DamagedArtifact: it is no such list.
    """
    if digest is None:
        return None
    fix = f"bring {FORGET} back (`git checkout {FORGET}`); after an edit on purpose, set data.forget to its sha256"
    if not path.is_file():
        raise MissingInput(f"{path} is missing, and data.forget names it", fix=fix)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 0x0A] if grown else []
    if (found := digest_bytes(content)) != digest and digest not in (digest_bytes(content[:end]) for end in ends):
        raise PinMismatch(f"{path} has sha256 {found}, data.forget says {digest}", fix=fix)
    try:
        first, *others = (json.loads(line) for line in content.splitlines())
        found_list = Forgotten(
            first["salt"], tuple(pair for each in others for pair in each.items()), first.get("shape")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{path} is not a list of what is forgotten: {error}", fix=fix) from error
    if shape is not None and found_list.shape not in (None, shape):
        raise PinMismatch(
            f"{path} is of rows that were read in another way: contents on it would not be known again after the change of"
            " data.layout, messages, prompt, answer, system, tools or sources",
            fix="take the change back; or `regraft data forget` again, with all that was named before (--match, --id), which"
            " lists the rows as they are read now",
        )
    return found_list
