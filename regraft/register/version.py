"""What a version is: its identity, its tags, and the record of how the champion changed. No MLflow here."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.artifacts import digest_json

CHAMPION = "champion"
CHALLENGER = "challenger"
PREFIX = "regraft."
"""Every tag that Regraft writes begins with it."""
COMPLETE = "regraft.complete"
"""Tag of a version that Regraft made whole; it is set by the very call that creates the version."""
FORGET_TAG = "regraft.forget"
"""Tag of a version that was trained on rows which are to be forgotten; see `regraft.forget`."""
LIST_TAG = "regraft.forget_list"
"""Tag with the `data.forget` that a version was made with, the last time that it was made; see `register.clean`."""
LEDGER = "regraft.ledger."
"""Tags of the registered model, one for each change of the champion: `regraft.ledger.000001`, ..."""
_LONGEST = 1000  # characters of a reason; a tag of a registered model holds 5,000 in PostgreSQL and MySQL


def identity(*, adapter: str, base: str, tokenizer: str, data: str, params: str) -> str:
    """Return a version's identity: equal adapter, base, tokenizer, training data and parameters give the same one.

    Args:
        adapter: digest of the adapter's files.
        base: digest of the base model's weights and configuration.
        tokenizer: digest of the tokenizer's files and chat template.
        data: digest of the processed training data.
        params: digest of the training parameters.
    """
    return digest_json({"adapter": adapter, "base": base, "tokenizer": tokenizer, "data": data, "params": params})


@dataclass(frozen=True)
class Version:
    """One registered adapter."""

    name: str
    """The registered model."""
    number: int
    """MLflow's version number."""
    uri: str
    """The store that it was found in."""
    source: str
    """Where its files are: a folder, or a URI that MLflow downloads from."""
    run_id: str
    """The MLflow run of its training."""
    created_ms: int
    """When it was registered, milliseconds since 1970 (UTC)."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Digests and verdict, see the properties."""
    aliases: tuple[str, ...] = ()
    new: bool = False
    """True where this call of `register` created it."""

    @property
    def identity(self) -> str:
        """Digest of what made it; see `identity`."""
        return self.tags.get("regraft.identity", "")

    @property
    def adapter_digest(self) -> str:
        """Digest of {file: sha256} of the adapter's folder."""
        return self.tags.get("regraft.adapter_digest", "")

    @property
    def base_digest(self) -> str:
        """Digest of the base that it was trained on."""
        return self.tags.get("regraft.base_digest", "")

    @property
    def holdout_digest(self) -> str:
        """Digest of the holdout that it was judged on when it was registered."""
        return self.tags.get("regraft.holdout_digest", "")

    @property
    def data_digest(self) -> str:
        """Digest of the accepted rows that it was trained from."""
        return self.tags.get("regraft.data_digest", "")

    @property
    def manifest_digest(self) -> str:
        """Digest of its files' manifest."""
        return self.tags.get("regraft.manifest", "")

    @property
    def verdict(self) -> str:
        """The last verdict about it: `passed` or `refused`."""
        return self.tags.get("regraft.verdict", "")

    @property
    def verdict_digest(self) -> str:
        """sha256 of the last verdict's file."""
        return self.tags.get("regraft.verdict_digest", "")

    @property
    def complete(self) -> bool:
        """Whether Regraft registered it whole; a version made by other tools is not."""
        return self.tags.get(COMPLETE) == "true"

    def label(self) -> str:
        """How messages call it."""
        return f"{self.name} version {self.number}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types for `--json`."""
        return {**asdict(self), "uri": masked(self.uri), "tags": dict(self.tags), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class Entry:
    """One change of the champion, as the ledger keeps it."""

    number: int
    """1 for the first; entries have no gaps."""
    action: Literal["promote", "rollback"]
    previous: int | None
    """Version number of the champion before."""
    version: int
    """Version number of the champion after."""
    adapter: str
    """Adapter digest of `version`."""
    verdict: str
    """sha256 of the verdict that allowed it."""
    reason: str
    who: str | None
    """Name from git's configuration; null where it has none."""
    at: str
    """UTC, ISO 8601."""

    @property
    def tag(self) -> str:
        """Its tag on the registered model."""
        return f"{LEDGER}{self.number:06d}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def shorten(reason: str) -> str:
    """Cut a reason to what a tag holds in every database."""
    return reason if len(reason) <= _LONGEST else reason[: _LONGEST - 3] + "..."


def champions(entries: list[Entry]) -> list[int]:
    """Replay the ledger into a stack of versions: the last is the champion, the one before is what rollback goes to.

    A promotion pushes; a rollback takes off everything above the version that it went to. So two rollbacks in a row
    go two champions back, not back and forth.
    """
    stack: list[int] = []
    for entry in entries:
        if entry.action == "rollback" and entry.version in stack:
            while stack[-1] != entry.version:
                stack.pop()
        elif not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack


def was_champion(entries: list[Entry], version: Version) -> bool:
    """Whether the ledger says that a version is the champion or was it at some time."""
    return any((each.version, each.adapter) == (version.number, version.adapter_digest) for each in entries)


def local_folder(source: str) -> Path | None:
    """Return the folder that a `source` names, None where it is not on this machine's disk."""
    if source.startswith("file://"):
        from urllib.parse import unquote, urlparse

        return Path(unquote(urlparse(source).path))
    return None if "://" in source or ":/" in source else Path(source)


def masked(uri: str) -> str:
    """Hide the password of a URI, for messages and records."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", uri)
