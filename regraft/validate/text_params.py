"""Parts of section `validate` on what texts are written in and on whom they name, each off until it is asked for."""

from typing import Annotated

from pydantic import Field

from regraft.params import Section


class Scripts(Section):
    """Which writing systems rows are in."""

    allowed: list[Annotated[str, Field(pattern=r"^[A-Z][A-Za-z_]{2,30}$")]] = Field(min_length=1)
    """Unicode scripts by their names in RE2, such as Latin, Han, Hangul, Hiragana, Katakana, Cyrillic, Arabic, Devanagari.
    Letters that Unicode counts to no one script are always allowed."""

    letters: float = Field(default=0.2, ge=0, lt=1)
    """Share of a row's letters that may be of another script; 0 to below 1. Names and quotations need some."""

    quarantine: bool = False
    """Whether a row with more is quarantined as `foreign_script`; if not, it is only counted for `expectations.scripts`."""


class Languages(Section):
    """Which languages rows are in; a question, an answer or a text each by itself. Needs the extra `language`."""

    allowed: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = Field(min_length=1)
    """Languages by ISO 639 codes, such as en, de or pt; those that py3langid knows."""

    probability: float = Field(default=0.05, gt=0, lt=1)
    """A text is in another language where those allowed together are less probable than this; above 0 to below 1. Short
    texts are seldom sure, so at 0.5 one request in 80 of a bank's English customers would be taken for another language;
    at 0.05 none of 9,585 was."""

    letters: int = Field(default=20, ge=1)
    """Texts with fewer letters are not judged: too little to tell by."""

    characters: int = Field(default=400, ge=20, le=100_000)
    """Of each text, only so many from its beginning are looked at: more make it no surer and cost time."""

    quarantine: bool = False
    """Whether a row in another language is quarantined as `foreign_language`; if not, it is only counted for
    `expectations.language`."""


class Personal(Section):
    """What Presidio looks for; rows that hold it are quarantined as `personal_data` and masked. Needs the extra `presidio`."""

    model: str | None = None
    """An installed spaCy model such as en_core_web_lg, which finds PERSON and LOCATION; it is never fetched from here. Null:
    only what a pattern can say is found."""

    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] = "en"
    """The language of the model and of the patterns."""

    entities: list[Annotated[str, Field(pattern=r"^[A-Z][A-Z_]{1,40}$")]] = Field(
        default=["PERSON", "LOCATION"], min_length=1
    )
    """Kinds as Presidio names them, such as PERSON, LOCATION, US_SSN, IP_ADDRESS or MEDICAL_LICENSE."""

    score: float = Field(default=0.5, ge=0, le=1)
    """Findings with a lower score are passed over; 0 to 1. Presidio gives names by a model 0.85, bare digits 0.05."""
