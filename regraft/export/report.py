"""What an export measured and decided: `certificate.json` of a published folder, and the stage's report."""

from pydantic import BaseModel, ConfigDict, Field

from regraft.export.params import Form, Source
from regraft.export.survival import Survived
from regraft.gates.verdict import Verdict
from regraft.report import Report


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(_Part):
    """The adapter on the base that it was trained on."""

    rows: int
    """Held-out rows compared."""
    held_out: int
    """Rows of the whole holdout."""
    holdout_digest: str
    positions: int
    """Tokens of answers, at each of which the two distributions are compared."""
    loss: float | None
    """Mean negative log likelihood of an answer's token, in nats; null where it was not finite."""
    exact_match: float
    """Share of rows answered exactly, greedily."""
    quantized_modules: list[str]
    """Linear layers that really were quantised."""


class Parity(_Part):
    """How a merged model, loaded from its files, behaves beside the reference."""

    positions: int
    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    mean_kl: float | None
    """Mean KL(reference ‖ merged) over positions, in nats; null where it was not finite."""
    max_kl: float | None
    loss: float | None
    exact_match: float
    same_answers: float
    """Share of rows for which both generate the same answer, token by token."""


class Candidate(_Part):
    """One merge: which base, and how it did."""

    source: Source
    digest: str
    """Digest of its files' manifest."""
    error: str | None
    """Why it could not be loaded or does not count; null where it was measured."""
    parity: Parity | None
    survival: list[Survived] = Field(default_factory=list)
    """How much of each module's change is left in the stored weights."""
    form: Form | None = None
    """Null for the merged weights themselves."""


class Scores(Report):
    """What the verifying process found out."""

    reference: Reference
    candidates: list[Candidate]
    environment: dict[str, str]
    """Versions of what computed, and the kind of device."""


class FileEntry(_Part):
    """One file of an export."""

    sha256: str
    size: int


class Certificate(Report):
    """What was merged from what, how the files behaved when they were loaded from disk, and the verdict."""

    identity: str
    """Identity of the version."""
    key: str
    """Digest of everything that the export depends on: equal keys give equal bytes (on a CPU)."""
    verdict: Verdict
    chosen: Source | None
    """The candidate that is nearest to the reference; null where none could be measured."""
    dtype: str
    base: dict[str, str | None]
    """Source, name (never a path), revision and digest of the base that was merged into."""
    quantization: dict[str, int | str | bool | list[str]]
    """How that base lay in memory in training."""
    adapter_digest: str
    tokenizer_digest: str
    lineage_digest: str
    """Digest of `lineage.json`'s content."""
    reference: Reference
    candidates: list[Candidate]
    forms: list[Candidate] = Field(default_factory=list)
    """The other forms that were asked for, each made of the chosen candidate and measured."""
    environment: dict[str, str]
    files: dict[str, FileEntry]
    """Every file but this one, SHA256SUMS and manifest.json; empty in the certificate of a refusal."""


class ExportReport(Report):
    """The stage's result: where the verified export lies."""

    identity: str
    folder: str
    """Relative to the folder of exports."""
    already_exported: bool
    """An export of this key was there, whole, and nothing was made."""
    certificate_digest: str
    """sha256 of `certificate.json`."""
    chosen: Source
    parity: Parity
    reference_exact_match: float
    size: int
    """Bytes of all files."""
    removed: list[str]
    """Older exports that `keep` left no room for."""
