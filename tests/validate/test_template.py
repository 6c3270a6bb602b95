import pytest

from regraft.validate.template import columns, fill, parse


def test_a_template_joins_its_literals_and_columns() -> None:
    assert fill(parse("Q: {question} {{{n}}}"), {"question": "why?", "n": 3}) == "Q: why? {3}"


def test_null_is_nothing_and_objects_are_json() -> None:
    assert fill(parse("{a}|{b}|{c}"), {"a": None, "b": {"x": "é"}, "c": True}) == '|{"x": "é"}|true'


def test_a_row_without_the_column_makes_no_text() -> None:
    assert fill(parse("{question}"), {"answer": "x"}) is None


@pytest.mark.parametrize("template", ["{", "{}", "{a:>10}", "{a!r}", "a}"])
def test_only_plain_column_names_stand_between_braces(template: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(template)


def test_attributes_and_indexes_are_names_of_columns_and_not_followed() -> None:
    assert columns("{a.__class__}{b[0]}") == ["a.__class__", "b[0]"]
    assert fill(parse("{a.__class__}"), {"a": 1}) is None
