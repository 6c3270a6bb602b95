"""Languages within a script, by py3langid, on sentences that people wrote."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import GateRefused, MissingInput, ParamsError
from regraft.validate import languages
from regraft.validate.mapping import Row
from regraft.validate.text_params import Languages

SENTENCES = {  # headlines and requests of the usual length, some without a letter that tells them apart
    "de": [
        "Die ganze Stadt ist ein Startup: Shenzhen ist das Silicon Valley für Hardware-Firmen",
        "Trend zum Urlaub in Deutschland beschert Gastwirten mehr Umsatz",
        "Wo bleibt meine Bestellung von letzter Woche?",
        "Ich möchte die Lampe gerne umtauschen, geht das noch?",
        "Bitte stornieren Sie den Auftrag und erstatten Sie mir das Geld.",
    ],
    "fr": [
        "Apple cherche à acheter une start-up anglaise pour un milliard de dollars",
        "Je voudrais annuler ma commande, s'il vous plaît.",
        "Où se trouve mon colis depuis une semaine ?",
    ],
    "es": [
        "Apple está buscando comprar una startup del Reino Unido por mil millones de dólares.",
        "Quiero devolver el pedido porque ha llegado roto.",
    ],
    "it": [
        "Apple vuole comprare una startup del Regno Unito per un miliardo di dollari",
        "Vorrei cambiare la data di consegna del mio ordine.",
    ],
    "nl": [
        "Apple overweegt om voor 1 miljard een U.K. startup te kopen",
        "Ik wil mijn bestelling graag annuleren en mijn geld terug.",
    ],
    "sv": [
        "Apple överväger att köpa brittisk startup för 1 miljard dollar.",
        "Jag vill byta tillbaka min beställning.",
    ],
    "pl": ["Poczuł przyjemną woń mocnej kawy.", "Chciałbym zwrócić uszkodzoną lampę i dostać pieniądze."],
}
ENGLISH = [
    "Where is my order from last week?",
    "I would like to exchange the lamp, is that still possible?",
    "Please cancel order A-1207 and send me my money back.",
    "Apple is looking at buying U.K. startup for $1 billion",
    "San Francisco considers banning sidewalk delivery robots",
    "My card payment is still pending, what can I do about it?",
]


@pytest.fixture(autouse=True)
def _there() -> None:
    pytest.importorskip("py3langid", reason="the extra `language` is not installed")


def test_each_sentence_in_another_language_is_found_and_no_english_one(stage: Any, chat: Any) -> None:
    foreign = [text for texts in SENTENCES.values() for text in texts]
    stage.write("a.jsonl", "".join(chat(text, "ok") for text in (*ENGLISH, *foreign)))
    report = stage.run(language={"allowed": ["en"], "quarantine": True})
    assert [row["messages"][0]["content"] for row in stage.rows()] == ENGLISH
    assert report.quarantined_by_reason == {"foreign_language": len(foreign)}
    assert report.rows_in_other_languages == len(foreign)


def test_languages_that_are_allowed_together_are_let_through_and_a_third_is_not(stage: Any, chat: Any) -> None:
    texts = (*ENGLISH, *SENTENCES["de"], *SENTENCES["fr"])
    stage.write("a.jsonl", "".join(chat(text, "ok") for text in texts))
    stage.run(language={"allowed": ["de", "en"], "quarantine": True})
    assert [row["messages"][0]["content"] for row in stage.rows()] == [*ENGLISH, *SENTENCES["de"]]


def test_of_real_requests_in_english_hardly_one_is_taken_for_another_language(shared: Path) -> None:
    with (shared / "data/banking77/train.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    params = Languages(allowed=["en"])
    allowed = {*languages.allowed_codes(params), "zxx"}
    wrong = sum(languages._is_other(text, allowed, params) for text in texts)
    assert len(texts) > 10_000
    assert wrong <= 10  # one in a thousand; none when this was written


def test_it_warns_by_default_and_blocks_if_asked(stage: Any, chat: Any) -> None:
    stage.write("a.jsonl", "".join(chat(text, "ok") for text in (*ENGLISH, SENTENCES["de"][0])))
    report = stage.run(language={"allowed": ["en"]})
    found = next(each for each in report.expectations if each.name == "language")
    assert (found.passed, found.level, found.rows) == (False, "warn", 1)
    assert report.passed
    assert report.rows_out == len(ENGLISH) + 1
    with pytest.raises(GateRefused, match="language: measured"):
        stage.run(language={"allowed": ["en"]}, expectations={"language": {"level": "block", "share": 0.1}})


def test_off_by_default_and_then_nothing_is_loaded_or_said_of_it(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(languages, "_identifier", None)
    stage.write("a.jsonl", chat(SENTENCES["de"][0]))
    report = stage.run()
    assert report.rows_out == 1
    assert "language" not in {each.name for each in report.expectations}
    assert b"rows_in_other_languages" not in (stage.root / "out/report.json").read_bytes()


def test_answers_count_too_unless_a_program_parses_them(stage: Any, chat: Any) -> None:
    german = '{"action": "Bestellung stornieren und das Geld zurück erstatten"}'
    stage.write("a.jsonl", chat(ENGLISH[0], german) + chat(ENGLISH[1], "{}"))
    asked = {"allowed": ["en"], "quarantine": True}
    assert stage.run(language=asked).rows_out == 1
    assert stage.run(language=asked, answers_are_json=True).rows_out == 2


def test_sums_are_no_language() -> None:
    """An answer of GSM8K's: without what py3langid calls no language, too little of it is English."""
    text = "Shaun got 5*16=<<5*16=80>>80 votes\nEliot got 80*2=<<80*2=160>>160 votes\n#### 160"
    row = Row([{"role": "user", "content": ENGLISH[0]}, {"role": "assistant", "content": text}], {}, None, None)
    params = Languages(allowed=["en"])
    assert languages._is_other(text, {"en"}, params)
    assert languages.others([row], [True], params, answers=True) == []


@pytest.mark.parametrize(
    "text", ["", "Ja gut!", "12345 67890 12.50", "5 * 3 = <<5*3=15>>15; 15 + 2 = 17", "https://x.de/a?b=c"]
)
def test_what_is_too_short_or_no_language_is_not_judged(text: str) -> None:
    params = Languages(allowed=["en"])
    assert not languages._is_other(text, {"en", "zxx"}, params)


def test_of_a_row_only_so_much_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Recorder:
        def rank(self, text: str) -> list[tuple[str, float]]:
            seen.append(text)
            return [("en", 1.0)]

    monkeypatch.setattr(languages, "_identifier", Recorder)
    messages = [{"role": role, "content": SENTENCES["de"][0] * 900} for role in ("user", "assistant") * 500]
    row = Row([{"role": "system", "content": SENTENCES["de"][0]}, *messages], {}, None, None)
    params = Languages(allowed=["en"], characters=100)
    assert languages._texts(row, answers=True)[0] == messages[0]["content"]
    assert not any(languages._is_other(text, {"en"}, params) for text in languages._texts(row, answers=True))
    assert len(seen) < 32
    assert {len(text) for text in seen} == {100}


def test_the_other_answer_of_a_pair_counts_too(stage: Any) -> None:
    pair = {"prompt": ENGLISH[0], "chosen": ENGLISH[1], "rejected": ENGLISH[2]}
    stage.write("a.jsonl", json.dumps(pair) + "\n" + json.dumps({**pair, "rejected": SENTENCES["de"][0]}) + "\n")
    report = stage.run({"layout": "preference"}, language={"allowed": ["en"], "quarantine": True})
    assert report.quarantined_by_reason == {"foreign_language": 1}


def test_a_language_that_nobody_knows_and_a_library_that_is_not_there_are_said_before_anything_is_read(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.write("a.jsonl", chat("hi"))
    with pytest.raises(ParamsError, match=r"allowed has qq; expected some of .* de "):
        stage.run(language={"allowed": ["en", "qq"]})
    languages._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingInput, match="py3langid") as caught:
        stage.run(language={"allowed": ["en"]})
    assert caught.value.fix == "pip install 'regraft[language]'"
    languages._identifier.cache_clear()
