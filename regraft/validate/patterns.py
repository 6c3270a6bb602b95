"""What must not be in a text: hidden characters, mojibake, personal data and secrets; and how it is masked.

The patterns for Arrow are in RE2's syntax and run over a column at once. Personal data is found by Python patterns, which
both detect and mask, so that what is found is what is masked; Arrow only picks the few texts worth a look.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from regraft.errors import ParamsError

CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F\x{80}-\x{9F}]"
"""C0 and C1 controls and DEL, without tab, line feed and carriage return (RE2)."""

BIDI = r"[\x{202A}-\x{202E}\x{2066}-\x{2069}]"
"""Embeddings, overrides and isolates of the bidirectional algorithm, as in CVE-2021-42574 (RE2)."""


def _trail(without: str = "") -> str:
    """Return a class of what the bytes 80-BF become when read as Windows-1252 or Latin-1."""
    found = {chr(byte) for byte in range(0x80, 0xC0)}
    found |= set(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore"))
    return "[" + "".join(f"\\x{{{ord(c):X}}}" for c in sorted(found - set(without))) + "]"


MOJIBAKE = "|".join(
    (
        "\\x{FFFD}",
        "[\u00c2\u00c3]" + _trail("\u2019\u201d"),  # two bytes of Latin-1; a closing quote after a capital is prose
        "\u00e2[\u20ac\u201a\u201e\u2020\u02c6\u201d\u2013\u02dc\u0153\u0080\u0082\u0084\u0086\u0088]" + _trail(),
        "\u00f0[\u0178\u009f]" + _trail() + "{2}",
        "(?:[\u00c4-\u00df]" + _trail() + "){3}",  # Greek, Cyrillic: one alone may be a capital before a quote
        "(?:[\u00e3-\u00ef]" + _trail() + "{2}){2}",  # Chinese, Japanese: one alone may be French before a guillemet
    )
)
"""UTF-8 that was decoded as Windows-1252 or Latin-1, and the replacement character (RE2)."""


def foreign(texts: Any, allowed: Sequence[str], letters: float) -> Any:
    """Say of each text whether more than a share of its letters is of other scripts; False where there is no text.

    Args:
        texts: an Arrow array of strings.
        allowed: names of Unicode scripts as RE2 has them.
        letters: the share, 0 to 1.

    Raises:
        ParamsError: there is no such script.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    others = r"[^\P{L}\p{Common}\p{Inherited}" + "".join(rf"\p{{{script}}}" for script in allowed) + "]"
    try:
        strange: Any = pc.count_substring_regex(texts, others)
    except pa.ArrowInvalid as error:
        raise ParamsError(
            f"validate.scripts.allowed has a name that is no Unicode script: {', '.join(allowed)}",
            fix="use names such as Latin, Han, Hangul, Hiragana, Katakana, Cyrillic, Greek, Arabic, Hebrew, Devanagari",
        ) from error
    all_: Any = pc.count_substring_regex(texts, r"\pL")
    return pc.fill_null(pc.greater(strange, pc.multiply(pc.cast(all_, pa.float64()), letters)), False)


EMAIL_HINT = r"\S@\S+\.\S"
CARD_HINT = r"[0-9](?:[ .\x{A0}\x{202F}-]?[0-9]){12}"
IBAN_HINT = r"[A-Za-z]{2}[0-9]{2}[ \x{A0}]?[A-Za-z0-9]{4}"
PHONE_HINT = r"(?:\+|\b00)[1-9][0-9 ().\x{A0}/-]{6}"
SECRET_HINT = r"sk-|AKIA|gh[pousr]_|github_pat_|xox[abeprs]-|hf_|glpat-|eyJ|PRIVATE KEY"

_EMAIL = re.compile(r"[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,63}")
_GAP = "[ .\u00a0\u202f-]"
_CARD = re.compile(
    # The usual groupings, found at overlapping places: 99 4111 1111 1111 1111 holds one that starts at the second group.
    rf"(?<![0-9])(?=([0-9]{{13,19}}(?![0-9])"
    rf"|[0-9]{{4}}(?:{_GAP}[0-9]{{4}}){{3}}(?:{_GAP}[0-9]{{3}})?(?![0-9])"
    rf"|[0-9]{{4}}{_GAP}[0-9]{{6}}{_GAP}[0-9]{{4,5}}(?![0-9])))"
)
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])([A-Za-z]{2}[0-9]{2}(?:[ \u00a0]?[A-Za-z0-9]{4}){2,7}(?:[ \u00a0]?[A-Za-z0-9]{1,3})?)(?![A-Za-z0-9])"
)
_IBAN_LENGTHS = {  # ISO 13616, the registry of SWIFT
    **dict.fromkeys(["NO"], 15), **dict.fromkeys(["BE"], 16), **dict.fromkeys(["DK", "FI", "FO", "GL", "NL"], 18),
    **dict.fromkeys(["MK", "SI"], 19), **dict.fromkeys(["AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"], 20),
    **dict.fromkeys(["CH", "CR", "HR", "LI", "LV"], 21), **dict.fromkeys(["BG", "BH", "DE", "GB", "GE", "IE", "ME", "RS"], 22),
    **dict.fromkeys(["AE", "GI", "IL", "IQ", "OM", "TL"], 23),
    **dict.fromkeys(["AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG", "YE"], 24),
    **dict.fromkeys(["LY", "PT", "ST"], 25), **dict.fromkeys(["IS", "TR"], 26),
    **dict.fromkeys(["BI", "DJ", "FR", "GR", "IT", "MC", "MR", "SM"], 27),
    **dict.fromkeys(["AL", "AZ", "BY", "CY", "DO", "GT", "HN", "HU", "LB", "NI", "PL", "SV"], 28),
    **dict.fromkeys(["BR", "EG", "PS", "QA", "UA"], 29), **dict.fromkeys(["JO", "KW", "MU"], 30),
    **dict.fromkeys(["MT", "SC"], 31), "LC": 32, "RU": 33,
}  # fmt: skip
_PHONE = re.compile(r"(?<![\w.+])(?:\+|(?<![0-9][ .-])00)([1-9](?:[ ().\u00a0/-]{0,2}[0-9]){7,14})(?![0-9])")
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[47]|3[0689]|35|6011|64|65|62|50|5[6-9]|6[37]")
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*"
    r"|\bsk-[A-Za-z0-9_-]{20,200}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,255}|\bgithub_pat_\w{40,255}"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,200}|\bhf_[A-Za-z0-9]{30,100}|\bglpat-[\w-]{20,100}"
    r"|\beyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{10,1000}"
)


def luhn(digits: str) -> bool:
    """Say whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Yield where e-mail addresses are."""
    for match in _EMAIL.finditer(text):
        yield match.span()


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yield where payment card numbers are.

    That is: 13 to 19 digits in a usual grouping, of a known issuer, with a right check digit, and not the decimals of a
    number.
    """
    end = 0
    for match in _CARD.finditer(text):
        start, stop = match.span(1)
        digits = re.sub("[^0-9]", "", match.group(1))
        decimals = start >= 2 and text[start - 1] == "." and text[start - 2].isdigit()
        if start >= end and not decimals and _ISSUER.match(digits) and luhn(digits):
            end = stop
            yield start, stop


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Yield where bank account numbers are: of a known country, of its length, with right check digits (ISO 13616)."""
    for match in _IBAN.finditer(text):
        start = match.start(1)
        plain, ends = "", []
        for place, letter in enumerate(match.group(1)):
            if letter not in " \u00a0":
                plain += letter.upper()
                ends.append(start + place + 1)
        length = _IBAN_LENGTHS.get(plain[:2], 0)
        if not length or len(plain) < length:  # words may follow a number that is written in groups
            continue
        end = ends[length - 1]
        if end < match.end() and text[end] not in " \u00a0":
            continue
        digits = "".join(str(int(letter, 36)) for letter in plain[4:length] + plain[:4])
        if int(digits) % 97 == 1:
            yield start, end


def find_phones(text: str) -> Iterator[tuple[int, int]]:
    """Yield where telephone numbers in international form are (E.164: a country code and 8 to 15 digits).

    National forms are not found: nothing tells them from other numbers.
    """
    for match in _PHONE.finditer(text):
        yield match.span()


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Yield where API keys, tokens and private keys are, by the forms that their issuers gave them."""
    for match in _SECRET.finditer(text):
        yield match.span()


FINDERS = {
    "email": find_emails,
    "card_number": find_cards,
    "iban": find_ibans,
    "phone": find_phones,
    "secret": find_secrets,
}
"""How each kind of `validate.pii` is found."""

HINTS = {
    "email": EMAIL_HINT,
    "card_number": CARD_HINT,
    "iban": IBAN_HINT,
    "phone": PHONE_HINT,
    "secret": SECRET_HINT,
}
"""RE2 patterns that match wherever the finder of the same name might find something."""


_SHORTEST, _SHORTEST_OF_LETTERS = 6, 15  # characters of the shortest thing that is masked, and of one of letters alone
_SECRET_SIGNS = (
    "PRIVATE KEY", "sk-", "AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "xox", "hf_", "glpat-", "eyJ",
)  # fmt: skip
# Each begins with a class of characters, by which a search goes on at memory's speed.
_COUNTRY_CODE = re.compile("\\+[1-9]|00[1-9]")
_LETTERS_THEN_DIGITS = re.compile("[0-9]{2}(?<=[A-Za-z]{2}[0-9]{2})")
_THIRTEEN_DIGITS = re.compile(f"[0-9](?:{_GAP}?[0-9]){{12}}")


def _may_hold(text: str) -> list[str]:
    """Return the kinds whose finders might find something: none is left out that would, and it takes a tenth of the time."""
    found = []
    if any([sign in text for sign in _SECRET_SIGNS]):  # noqa: C419 - a list is made in half the time of a generator
        found.append("secret")
    if _LETTERS_THEN_DIGITS.search(text):
        found.append("iban")
    if _THIRTEEN_DIGITS.search(text):
        found.append("card_number")
    if _COUNTRY_CODE.search(text):
        found.append("phone")
    if "@" in text:
        found.append("email")
    return found


def mask(text: str) -> str:
    """Return the text with every secret, number of a card, an account or a telephone, and address replaced by its kind."""
    if len(text) < _SHORTEST or (len(text) < _SHORTEST_OF_LETTERS and text.isalpha()):
        return text
    for kind in _may_hold(text):
        for start, stop in reversed(list(FINDERS[kind](text))):
            text = f"{text[:start]}[{kind}]{text[stop:]}"
    return text
