import json

import pytest

from regraft.validate.params import Reason
from regraft.validate.quarantine import shown
from regraft.validate.raw import RawRow

CARD = "4111 1111 1111 1111"


def of(text: str) -> RawRow:
    raw = text.encode()
    try:
        return RawRow(1, raw, record=json.loads(text))
    except ValueError:
        return RawRow(1, raw, reason=Reason.NOT_JSON)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "me\\u0040example.com"}',
        '{"a": "\\u00014111 1111 1111 1111"}',
        '{"a": [{"b": "4111111111111111"}]}',
        '{"a": 4111111111111111}',
        '{"me@example.com": 1}',
        '{"a": "me\\u0040example.com"',
        '{"a": "me@example.com',
        '{"a": "4111 1111\\u00201111 1111',
    ],
)
def test_no_escape_hides_personal_data(text: str) -> None:
    kept = shown(of(text))
    assert "example.com" not in kept
    assert "1111" not in kept
    assert ("[email]" in kept) != ("[card_number]" in kept)


def test_bytes_that_are_not_utf8_do_not_hide_a_card_number() -> None:
    kept = shown(RawRow(1, b"\x91" + CARD.encode() + b"\xff", reason=Reason.NOT_UTF8))
    assert kept == "\ufffd[card_number]\ufffd"


def test_what_the_cut_would_divide_is_masked_first() -> None:
    text = json.dumps({"a": "x" * 1985 + " me@example.com"})
    assert shown(of(text)).endswith("x [email]")
    assert "me@" not in shown(of(text))
    many = ("a" * 60 + "@" + "b" * 60 + ".example.com ") * 200
    assert "aaa" not in shown(RawRow(1, many.encode(), reason=Reason.NOT_JSON))


def test_at_most_two_thousand_characters_are_kept() -> None:
    assert len(shown(of(json.dumps({"a": "x" * 100_000})))) == 2000
    assert len(shown(of("x" * 100_000))) == 2000


def test_a_row_nested_as_deep_as_the_parser_goes_is_shown_all_the_same() -> None:
    depth = 900
    text = '{"a": ' + "[" * depth + '"me@example.com"' + "]" * depth + "}"
    assert "[email]" in shown(of(text))


def test_lone_surrogates_are_replaced() -> None:
    assert shown(of('{"a": "\\ud83d"}')) == '{"a": "?"}'
