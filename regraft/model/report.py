"""What `regraft.model` pinned."""

from typing import ClassVar, Literal

from pydantic import Field

from regraft.late import LateFields
from regraft.report import Report


class BaseReport(LateFields, Report):
    """The base model, by content: everything that is loaded later is checked against these digests."""

    LATE: ClassVar[frozenset[str]] = frozenset({"new_tokens"})

    source: Literal["standin", "folder", "hub"]
    """Where the base came from."""
    base: str
    """`model.base` as `params.yaml` gave it."""
    name: str
    """What an adapter's config and a model card call it: the hub id, the folder's last name, or `standin`."""
    revision: str | None
    """Commit on the hub; null for a folder and the stand-in."""
    path: str | None
    """The folder with the weights, relative to the clone or as given; null for a hub model, found in the hub's cache."""
    digest: str
    """Digest of {file: sha256} over weights and configuration."""
    tokenizer_digest: str
    """Digest of {file: sha256} over the tokenizer's files and the chat template."""
    files: dict[str, str]
    """sha256 of every file that counts towards either digest."""
    parameters: int
    """Weights stored, tied ones once."""
    dtype: str
    """The dtype that most of the weights are stored in: `float32`, `bfloat16` or `float16`."""
    architecture: str
    """Class of the model, from its configuration."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer was extended by; it then lies beside this report. Left out where there are none."""
