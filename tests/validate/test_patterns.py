import pyarrow as pa
import pyarrow.compute as pc
import pytest

from regraft.validate.patterns import (
    BIDI,
    CONTROL,
    FINDERS,
    HINTS,
    MOJIBAKE,
    find_cards,
    find_emails,
    find_ibans,
    find_phones,
    find_secrets,
    luhn,
    mask,
)

KEY = "sk-" + "a1B2" * 8  # put together here, so that no scanner takes it for a real one
TOKEN = "ghp_" + "x9" * 18


def matches(pattern: str, text: str) -> bool:
    return bool(pc.match_substring_regex(pa.array([text]), pattern)[0].as_py())


@pytest.mark.parametrize("text", ["\x00", "a\x07b", "\x1b[31m", "\x7f", "\x85", "a\x0cb"])
def test_control_characters_are_found(text: str) -> None:
    assert matches(CONTROL, text)


@pytest.mark.parametrize("text", ["a\tb\r\nc", "é 漢字 🙂", "\u200d", "<|im_end|>"])
def test_tabs_line_ends_and_special_tokens_are_no_control_characters(text: str) -> None:
    assert not matches(CONTROL, text)


def test_bidi_overrides_are_found_and_right_to_left_text_is_not() -> None:
    assert matches(BIDI, "pay \u202e001 to")
    assert matches(BIDI, "\u2067x\u2069")
    assert not matches(BIDI, "שלום \u200f عليكم")


@pytest.mark.parametrize(
    "text",
    ["café", "it\u2019s", "20 €", "naïve", "ESPAÑA", "“quoted”", "Привет", "你好", "🙂", "x → y", "5 °C"],
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_is_found_whatever_it_was(text: str, wrong: str) -> None:
    broken = text.encode().decode(wrong, errors="replace")
    assert matches(MOJIBAKE, broken)
    assert not matches(MOJIBAKE, text)


@pytest.mark.parametrize(
    "text", ["«\u00a0un été\u00a0», dit-il", "IRMÃ” e “CAFÉ”", "SÃO PAULO", "Â", "voilà", "Straße»"]
)
def test_accents_beside_quotes_are_not_mojibake(text: str) -> None:
    assert not matches(MOJIBAKE, text)


def test_the_check_digit_is_checked() -> None:
    assert luhn("4111111111111111")
    assert not luhn("4111111111111112")


@pytest.mark.parametrize(
    "number",
    [
        "4111 1111 1111 1111",
        "4111111111111111",
        "5555-5555-5555-4444",
        "3782 822463 10005",
        "378282246310005",
        "4111\u00a01111\u00a01111\u00a01111",
        "4111.1111.1111.1111",
    ],
)
def test_card_numbers_are_found_in_the_groupings_that_people_write(number: str) -> None:
    text = f"order 99 {number}, thanks"
    assert [text[start:stop] for start, stop in find_cards(text)] == [number]


@pytest.mark.parametrize(
    "text",
    ["4111 1111 1111 1112", "1111 1111 1111 1117", "0.4111111111111111", "94111111111111111999", "call 4155551234567"],
)
def test_other_numbers_are_no_card_numbers(text: str) -> None:
    assert list(find_cards(text)) == []


def test_addresses_are_found_and_prices_at_are_not() -> None:
    assert len(list(find_emails("write to anna.o'neil+x@mail.example.co.uk or köln@exämple.org"))) == 2
    assert list(find_emails("2 lamps @ 5.00 each, me@home, @user, a @ b.com")) == []


@pytest.mark.parametrize("secret", [KEY, TOKEN, "AKIA" + "ABCD" * 4])
def test_secrets_are_found_by_their_form(secret: str) -> None:
    assert len(list(find_secrets(f"use {secret} please"))) == 1
    assert list(find_secrets("a risk-averse task-oriented asking-price-is-too-high")) == []


def test_masking_leaves_nothing_and_keeps_the_rest() -> None:
    key = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\nx"
    text = f"I am a.b@example.com, card 4111 1111 1111 1111, key {KEY}; {key}"
    assert mask(text) == "I am [email], card [card_number], key [secret]; [secret]"


@pytest.mark.parametrize(
    "text",
    ["x@y.zz", "4111 1111 1111 1111", "3782 822463 10005", KEY, TOKEN, "4111\u202f1111\u202f1111\u202f1111"],
)
def test_what_a_finder_finds_is_hinted_at(text: str) -> None:
    found = [kind for kind, find in FINDERS.items() if any(find(text))]
    assert len(found) == 1
    assert matches(HINTS[found[0]], text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pay to DE89 3704 0044 0532 0130 00 please", ["DE89 3704 0044 0532 0130 00"]),
        ("GB82WEST12345698765432", ["GB82WEST12345698765432"]),
        ("nl91 abna 0417 1643 00.", ["nl91 abna 0417 1643 00"]),
        ("DE89 3704 0044 0532 0130 01", []),  # a wrong check digit
        ("XX89 3704 0044 0532 0130 00", []),  # no such country
        ("xDE89370400440532013000", []),
        ("AB12 CDEF GHIJ", []),
    ],
)
def test_account_numbers_are_told_by_country_length_and_check_digits(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in find_ibans(text)] == found
    assert not found or pc.match_substring_regex(pa.array([text]), HINTS["iban"])[0].as_py()
    assert mask(text) == (text.replace(found[0], "[iban]") if found else text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("call +49 (0)30 1234-5678", ["+49 (0)30 1234-5678"]),
        ("0044 20 7946 0958", ["0044 20 7946 0958"]),
        ("+1.415.555.2671!", ["+1.415.555.2671"]),
        ("order 0301234567", []),
        ("5 + 12345678", []),
        ("x+12345678", []),
        ("1+1=2, +12 apples", []),
    ],
)
def test_telephone_numbers_are_told_in_international_form(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in find_phones(text)] == found
    assert not found or pc.match_substring_regex(pa.array([text]), HINTS["phone"])[0].as_py()
