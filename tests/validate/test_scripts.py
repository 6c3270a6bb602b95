"""Which writing systems rows are in: counted by default, quarantined where asked for."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from regraft.errors import ParamsError
from regraft.validate.patterns import foreign

Chat = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "allowed", "found"),
    [
        ("where is my lamp", ["Latin"], False),
        ("où est ma lampe à 20 € ?", ["Latin"], False),
        ("где моя лампа", ["Latin"], True),
        ("где моя лампа", ["Latin", "Cyrillic"], False),
        ("my friend Юрий asks about two lamps and one desk", ["Latin"], False),
        ("ランプはどこ", ["Han", "Hiragana", "Katakana"], False),
        ("램프가 어디 있나요", ["Hangul"], False),
        ("コーヒーメーカー", ["Katakana"], False),  # the sign of length is of no one script
        ("12345 !!", ["Latin"], False),
        ("", ["Latin"], False),
        ("e\u0301te\u0301", ["Latin"], False),
    ],
)
def test_letters_of_other_scripts_are_counted_against_all_letters(text: str, allowed: list[str], found: bool) -> None:
    assert foreign(pa.array([text, None], pa.large_string()), allowed, 0.2).to_pylist() == [found, False]


def test_rows_in_other_scripts_warn_and_stay_or_are_quarantined(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("where is it", "here") + chat("где это", "здесь") + "{\n")
    report = stage.run(scripts={"allowed": ["Latin"]})
    assert (report.rows_out, report.rows_in_other_scripts) == (2, 1)
    [found] = [each for each in report.expectations if each.name == "scripts"]
    assert (found.level, found.passed, round(found.measured, 3)) == ("warn", False, 0.333)
    report = stage.run(scripts={"allowed": ["Latin"], "quarantine": True})
    assert report.quarantined_by_reason == {"not_json": 1, "foreign_script": 1}


def test_it_is_off_by_default_and_a_script_that_there_is_not_is_a_mistake(stage: Any, chat: Chat) -> None:
    stage.write("a.jsonl", chat("где это", "здесь"))
    report = stage.run()
    assert report.rows_in_other_scripts is None
    assert all(each.name != "scripts" for each in report.expectations)
    with pytest.raises(ParamsError, match="a name that is no Unicode script: Latim"):
        stage.run(scripts={"allowed": ["Latim"]})
