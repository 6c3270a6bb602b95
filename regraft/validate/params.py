"""Sections `data` (where the rows are and how they are read) and `validate` (what they must fulfil)."""

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from regraft.params import Section
from regraft.validate.template import columns
from regraft.validate.text_params import Languages, Personal, Scripts

Level = Literal["block", "warn"]
"""`block`: the stage ends with exit code 3; `warn`: the report and the log say so, and the run goes on."""


class Reason(StrEnum):
    """Why a row is quarantined; a row may have several reasons."""

    EMPTY_ROW = "empty_row"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_CSV = "not_csv"
    WRONG_SHAPE = "wrong_shape"
    OVER_LONG = "over_long"
    WRONG_ROLES = "wrong_roles"
    MISSING_ANSWER = "missing_answer"
    EMPTY_TEXT = "empty_text"
    CONTROL_CHARACTERS = "control_characters"
    BIDI_CHARACTERS = "bidi_characters"
    MOJIBAKE = "mojibake"
    EMAIL = "email"
    CARD_NUMBER = "card_number"
    IBAN = "iban"
    PHONE = "phone"
    SECRET = "secret"
    ANSWER_NOT_JSON = "answer_not_json"
    UNKNOWN_LABEL = "unknown_label"
    SAME_ANSWERS = "same_answers"
    DIFFERENT_PROMPTS = "different_prompts"
    WRONG_TIME = "wrong_time"
    DUPLICATE = "duplicate"
    WRONG_TOOLS = "wrong_tools"
    FOREIGN_SCRIPT = "foreign_script"
    FOREIGN_LANGUAGE = "foreign_language"
    PERSONAL_DATA = "personal_data"
    DUPLICATE_KEYS = "duplicate_keys"


def _checked(template: str) -> str:
    if not columns(template):
        raise ValueError(f"a template with at least one column, as in '{{text}}', found {template!r}")
    return template


def _named(slices: object) -> object:
    """Turn a list of columns into templates by name; anything else is left for pydantic to judge."""
    if not isinstance(slices, list) or not all(isinstance(each, str) for each in slices):
        return slices
    return {name: "{" + name + "}" for name in slices}


Template = Annotated[str, AfterValidator(_checked)]
Slices = Annotated[dict[str, Template], BeforeValidator(_named)]
Layout = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "preference", "auto", "prompt_answer", "text"]
OTHER = "other"
"""What rows of files that are in no source are called."""
_SHAPE = ("messages", "prompt", "answer", "system", "tools")


class SourceParams(Section):
    """Files that are read in their own way, and whose rows are told apart by the slice `source`.

    What is left out is as section `data` has it; with a `layout` of its own, so is no column of a conversation.
    """

    path: list[str] = Field(min_length=1)
    """Files, folders and globs, relative to the clone, all of them among those of `data.raw`; a file is in one source."""

    layout: Layout | None = None
    """As `data.layout`."""

    messages: str | None = None
    """As `data.messages`."""

    prompt: Template | None = None
    """As `data.prompt`."""

    answer: Template | None = None
    """As `data.answer`."""

    system: str | None = None
    """As `data.system`."""

    tools: str | None = None
    """As `data.tools`."""

    id: str | None = None
    """As `data.id`; null where the source has none."""

    time: str | None = None
    """As `data.time`; null where the source has none."""

    slices: Slices = Field(default_factory=dict)
    """As `data.slices`, in their place."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_is_a_list(cls, path: object) -> object:
        return [path] if isinstance(path, str) else path


class DataParams(Section):
    """Where the rows are, and which columns make a conversation."""

    raw: list[str] = Field(default=["data/raw"], min_length=1)
    """Files, folders (read with all below them) and globs, relative to the clone. In params.yaml: data/raw or below it,
    since that folder is what DVC watches for the stage. Read: .jsonl, .ndjson, .json (a list of rows), .csv (commas),
    .tsv (tabs), all UTF-8 and as they are or as .gz or .zst; .parquet and .arrow. In a folder, names with a leading dot, .md, .dvc and files without a suffix are left out;
    any other file that cannot be read counts against `expectations.files`."""

    layout: Layout = "messages"
    """How a row holds a conversation; see `layouts.py`. `messages`: a column with a list of {role, content}. `sharegpt`: one
    with a list of {from, value}. `alpaca`: `instruction`, `input`, `output`. `prompt_completion`: `prompt`, `completion`.
    `preference`: `chosen` and `rejected` answers, or `completion` with a `label` of true or false, perhaps with `prompt`;
    see `preferences.py`. `auto`: whichever of these each row's columns show; preferences only where all files hold them. `prompt_answer`: templates build one question and its answer. `text`:
    a column of plain text, all of whose tokens are learned; such rows are never held out, since no answer is in them."""

    messages: str | None = None
    """The conversation's column, for layouts messages and sharegpt: roles system (only first), then user and assistant in
    turn. Null: `messages`, with sharegpt `conversations`. With `text`: the text's column; null: `text`."""

    prompt: Template | None = None
    """The user's message as a template over columns, such as "{text}", for layout `prompt_answer`."""

    answer: Template | None = None
    """The assistant's message as a template over columns, such as "{category}", for layout `prompt_answer`."""

    system: str | None = None
    """A system message put first, for layout `prompt_answer`: a fixed text, or a template over columns."""

    tools: str | None = None
    """For layout `messages`: the column with the tools that a conversation may call, in OpenAI's form (a list, or one as JSON
    text); a row may lack it. With it, messages may have `tool_calls` and the role `tool`. Null: such rows are quarantined."""

    sources: dict[str, SourceParams] = Field(default_factory=dict)
    """Files with columns of their own, by name. The name becomes the slice `source` of each of their rows (`other` for
    files in none), by which shares are expected (`validate.expectations.sources`) and weighed (`preprocess.mix`)."""

    forget: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """sha256 of `data/forget.jsonl`: what is never trained on again, as salted hashes. `regraft data forget` writes both."""

    id: str | None = None
    """The column with a row's own name, kept so that a row can be found again; it decides nothing."""

    time: str | None = None
    """The column with a row's time, ISO 8601 such as 2026-09-01 or 2026-09-01T10:00:00Z; freshness is judged by it."""

    slices: Slices = Field(default_factory=dict)
    """What results are told apart by: a list of columns, or {name: template}. Each a small set of values (at most
    1,000), since every value is counted in reports."""

    @property
    def turns(self) -> str:
        """The column with the list of turns."""
        return self.messages or {"sharegpt": "conversations", "text": "text"}.get(self.layout, "messages")

    def of_source(self, name: str) -> "DataParams":
        """Return the section as a source's files are read: its own values before the common ones."""
        own = self.sources[name].model_dump(exclude={"path"}, exclude_unset=True)
        shape = _SHAPE if own.get("layout") is not None else ()
        if own.get("layout", "") is None:
            del own["layout"]
        return DataParams.model_validate({**self.model_dump(exclude={"sources", *shape}), **own})

    def slice_names(self) -> set[str]:
        """Return the names of all slices that rows may have."""
        names = set(self.slices).union(*(each.slices for each in self.sources.values()))
        return names | {"source"} if self.sources else names

    @model_validator(mode="after")
    def _layout_has_its_columns(self) -> Self:
        if self.layout == "prompt_answer" and (self.prompt is None or self.answer is None):
            raise ValueError("`prompt` and `answer` templates with layout prompt_answer")
        if self.layout != "prompt_answer" and (self.prompt or self.answer or self.system):
            raise ValueError("layout: prompt_answer with the templates `prompt`, `answer` and `system`")
        if self.system is not None:
            columns(self.system)
        if self.tools is not None and self.layout != "messages":
            raise ValueError("layout: messages with `tools`")
        return self

    @model_validator(mode="after")
    def _sources_are_whole(self) -> Self:
        for name in self.sources:
            if name == OTHER or not name.strip():
                raise ValueError(f"a source's name other than {name!r}")
            try:
                read = self.of_source(name)
            except ValidationError as error:
                first: Any = error.errors(include_url=False)[0]
                raise ValueError(f"in source `{name}`: {first['msg'].removeprefix('Value error, ')}") from error
            if "source" in {*self.slices, *read.slices}:
                raise ValueError("no slice called `source` beside `sources`, which make one")
        return self


class ClonedDataParams(DataParams):
    """The section `data` of a clone's params.yaml: `raw` names only what `dvc.yaml` has as the stage's dependency."""

    @field_validator("raw")
    @classmethod
    def _is_watched(cls, raw: list[str]) -> list[str]:
        for entry in raw:
            parts = PurePosixPath(entry).parts
            if parts[:2] != ("data", "raw") or ".." in parts:
                raise ValueError(
                    "data/raw or places below it: DVC looks only there for new data, so files elsewhere would never "
                    f"be trained (`{entry}`); put the files, or a link to each file, into data/raw"
                )
        return raw

    @field_validator("sources")
    @classmethod
    def _sources_are_watched(cls, sources: dict[str, SourceParams]) -> dict[str, SourceParams]:
        for source in sources.values():
            cls._is_watched(source.path)
        return sources


class Labels(Section):
    """Which answers are right in kind."""

    json_field: str | None = None
    """The field of a JSON answer that holds the label; null: the whole answer is the label."""

    allowed: list[str] | None = None
    """Every label there is; null: any text. A row with another label is quarantined as `unknown_label`."""


class AtLeast(Section):
    """A number of rows that must be there."""

    level: Level = "block"
    """What happens when there are fewer."""

    minimum: int = Field(ge=0)
    """Rows, at least."""


class AtMost(Section):
    """A share of all rows read that may be so."""

    level: Level = "block"
    """What happens when there are more."""

    share: float = Field(ge=0, le=1)
    """Share of the rows read, at most; 0 to 1."""


class FilesAtMost(Section):
    """A number of files that may be unreadable."""

    level: Level = "block"
    """What happens when there are more."""

    unreadable: int = Field(default=0, ge=0)
    """Files, at most, that are of an unknown format, empty, or without one row that could be read."""


class SliceAtLeast(Section):
    """Rows that each value of a slice must have."""

    level: Level = "warn"
    """What happens when a value has fewer."""

    minimum: int = Field(ge=0)
    """Accepted rows of each value that occurs, at least."""

    values: list[str] | None = None
    """Values that must occur; null: no value must."""


class SourceShare(Section):
    """The share of the accepted rows that come from a source."""

    level: Level = "warn"
    """What happens when it is another."""

    minimum: float = Field(default=0.0, ge=0, le=1)
    """Share of the accepted rows, at least; 0 to 1."""

    maximum: float = Field(default=1.0, ge=0, le=1)
    """Share of the accepted rows, at most; 0 to 1."""


class Expectations(Section):
    """What the whole set of rows must fulfil, each with a level and a threshold."""

    rows: AtLeast = AtLeast(minimum=1)
    """Accepted rows."""

    quarantined: AtMost = AtMost(share=0.1)
    """Rows quarantined for whatever reason: more than a few per cent is a broken source, not single bad rows."""

    duplicates: AtMost = AtMost(level="warn", share=0.05)
    """Rows whose messages occurred before, in this file or an earlier one."""

    files: FilesAtMost = FilesAtMost()
    """Files that cannot be read: a file left out silently is a hole in the data."""

    reasons: dict[Reason, AtMost] = Field(default_factory=dict)
    """Rows quarantined for one reason; a row with two reasons counts in both."""

    slices: dict[str, SliceAtLeast] = Field(default_factory=dict)
    """Rows of a slice's values, by the slice's name in `data.slices`."""

    sources: dict[str, SourceShare] = Field(default_factory=dict)
    """Share of the accepted rows that come from a source, by its name in `data.sources` (`other` for files in none)."""

    scripts: AtMost = AtMost(level="warn", share=0.0)
    """Rows with too many letters of other scripts than `validate.scripts` allows; looked at only with it."""

    language: AtMost = AtMost(level="warn", share=0.0)
    """Rows in other languages than `validate.language` allows; looked at only with it."""


class ValidateParams(Section):
    """What every row, and the set of rows, must fulfil."""

    max_bytes: int = Field(default=16_384, ge=1, le=1_000_000)
    """UTF-8 bytes of a row's texts together, at most; 1 to 1,000,000. Longer rows are pasted documents and would be
    cut at `preprocess.max_length` anyway."""

    answers_are_json: bool = False
    """Whether the last assistant message must parse as JSON (strictly: no NaN, nothing after it). Of preferences, the
    answers that are wanted: the others may be wrong in just this."""

    labels: Labels | None = None
    """Which labels answers may hold; null: answers are free text."""

    text: list[Literal["control_characters", "bidi_characters", "mojibake"]] = Field(
        default=["control_characters", "bidi_characters", "mojibake"]
    )
    """What a row's texts must not hold: control characters other than tab and line ends; characters that reorder what
    a reader sees; UTF-8 that was decoded as something else."""

    pii: list[Literal["email", "card_number", "iban", "phone", "secret"]] = Field(
        default=["email", "card_number", "iban", "phone", "secret"]
    )
    """What must not be learnt: e-mail addresses, card numbers (by issuer, length and Luhn digit), bank account numbers
    (by country, length and check digits), telephone numbers in international form, API keys and private keys. All kinds are masked in quarantine.parquet, whether or not they are listed here."""

    scripts: Scripts | None = None
    """Which scripts rows are written in; null: any."""

    language: Languages | None = None
    """Which languages rows are written in; null: any."""

    personal: Personal | None = None
    """Names, places and other personal data that Presidio finds; null: not looked for. Slow: milliseconds a row and more."""

    duplicates: Literal["keep", "quarantine"] = "keep"
    """What happens to a row whose messages occurred before: `keep` counts it and lets `preprocess` drop it."""

    expectations: Expectations = Expectations()
    """What the whole set of rows must fulfil."""

    @model_validator(mode="after")
    def _label_field_is_of_json(self) -> Self:
        if self.labels is not None and self.labels.json_field is not None and not self.answers_are_json:
            raise ValueError("`answers_are_json: true` with `labels.json_field`")
        return self
