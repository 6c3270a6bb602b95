"""Presidio: its pattern recognizers for real on a blank model, and a spaCy model that a test makes and installs."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from regraft.errors import MissingInput, ParamsError
from regraft.validate import personal, work
from regraft.validate.params import ValidateParams
from regraft.validate.text_params import Personal

MODEL = "xy_names_tiny"
SSN, ADDRESS, LICENSE = "536-90-4399", "192.168.17.4", "BB1388568"
PATTERNS = {"entities": ["US_SSN", "IP_ADDRESS", "MEDICAL_LICENSE"], "score": 0.4}


@pytest.fixture(autouse=True)
def _there() -> Iterator[None]:
    pytest.importorskip("presidio_analyzer", reason="the extra `presidio` is not installed")
    personal._analyst.cache_clear()
    yield
    personal._analyst.cache_clear()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed spaCy package that finds a few names and places by a list."""
    import spacy

    pipeline = spacy.blank("en")
    ruler: Any = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": [{"LOWER": "ada"}, {"LOWER": "lovelace"}]},
            {"label": "PERSON", "pattern": "Konrad Zuse"},
            {"label": "GPE", "pattern": "Hünfeld"},
        ]
    )
    site = tmp_path / "site"
    (site / MODEL).mkdir(parents=True)
    pipeline.to_disk(site / MODEL / f"{MODEL}-1.0")
    (site / MODEL / "__init__.py").write_text(
        "from pathlib import Path\nfrom spacy.util import load_model_from_path\n"
        f"def load(**given):\n    return load_model_from_path(Path(__file__).parent / '{MODEL}-1.0', **given)\n"
    )
    (site / f"{MODEL}-1.0.dist-info").mkdir()
    (site / f"{MODEL}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODEL}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    yield MODEL
    sys.modules.pop(MODEL, None)


def kept(stage: Any) -> str:
    """All that the stage wrote, and what it keeps of quarantined rows."""
    files = b"".join(path.read_bytes() for path in (stage.root / "docs").rglob("*") if path.is_file())
    files += (stage.root / "out/report.json").read_bytes()
    return files.decode(errors="replace") + str(stage.quarantine()) + str(stage.rows())


def test_patterns_are_found_without_a_model_and_masked_wherever_they_stand(
    stage: Any, chat: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    stage.write(
        "a.jsonl",
        chat("hello", id="r-1")
        + chat(f"my social security number is {SSN}, ok?", id="r-2")
        + chat("which host?", f"the server at {ADDRESS}", id="r-3")
        + chat("hello again", id=f"license {LICENSE}")
        + chat("", note=f"from {ADDRESS}", id="r-5"),
    )
    report = stage.run({"id": "id"}, personal=PATTERNS)
    assert [row["id"] for row in stage.rows()] == ["r-1"]
    assert report.quarantined_by_reason == {"empty_text": 1, "personal_data": 3}
    assert "[us_ssn]" in stage.quarantine()[0]["raw"]
    assert stage.quarantine()[2]["id"] == "license [medical_license]"
    assert "[ip_address]" in stage.quarantine()[3]["raw"], "quarantined for another reason, masked all the same"
    for value in (SSN, ADDRESS, LICENSE):
        assert value not in kept(stage)
        assert value not in caplog.text


def test_names_and_places_are_found_by_a_model_that_is_installed(stage: Any, chat: Any, model: str) -> None:
    stage.write(
        "a.jsonl",
        chat("where is my lamp?")
        + chat("this is Ada Lovelace, where is it?")
        + chat("send it", "to Konrad Zuse in Hünfeld, today"),
    )
    report = stage.run(personal={"model": model})
    assert report.quarantined_by_reason == {"personal_data": 2}
    assert "to [person] in [location], today" in stage.quarantine()[1]["raw"]
    for value in ("Lovelace", "Zuse", "Hünfeld"):
        assert value not in kept(stage)


def test_a_number_that_presidio_finds_is_masked_in_what_is_kept(stage: Any) -> None:
    stage.write("a.jsonl", '{"ssn": 536904399, "n": 12345, "say": "yes"}\n{"ssn": 1, "say": "yes"}\n')
    data = {"layout": "prompt_answer", "prompt": "my ssn is {ssn}", "answer": "{say}"}
    report = stage.run(data, personal={"entities": ["US_SSN"], "score": 0.01})
    assert report.quarantined_by_reason == {"personal_data": 1}
    assert stage.quarantine()[0]["raw"] == '{"ssn": "[us_ssn]", "n": 12345, "say": "yes"}'


def test_personal_data_counts_against_an_expectation_of_its_own(stage: Any, chat: Any) -> None:
    stage.write("a.jsonl", chat("hello") + chat(f"at {ADDRESS}"))
    limits = {"quarantined": {"share": 1.0}, "reasons": {"personal_data": {"level": "warn", "share": 0.1}}}
    report = stage.run(personal=PATTERNS, expectations=limits)
    assert {each.name: each.passed for each in report.expectations}["reasons.personal_data"] is False


def test_a_label_in_the_report_is_masked_too(stage: Any, chat: Any) -> None:
    stage.write("a.jsonl", chat("hello", "fine") + chat("hello", f"host {ADDRESS}"))
    report = stage.run(personal=PATTERNS, labels={"allowed": ["fine"]})
    assert report.unknown_labels == {"host [ip_address]": 1}


def test_processes_of_their_own_write_the_same_bytes(stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write("a.jsonl", "".join(chat(f"{i} at {ADDRESS if i % 3 else 'home'}") for i in range(30)))
    stage.run(personal=PATTERNS)
    expected = (stage.root / "out/manifest.json").read_bytes()
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv("REGRAFT_WORKERS", "2")
    stage.run(personal=PATTERNS)
    assert (stage.root / "out/manifest.json").read_bytes() == expected


def test_overlapping_findings_leave_nothing_of_each_other() -> None:
    class Engine:
        def analyze(self, text: str, **_: Any) -> list[Any]:
            from presidio_analyzer import RecognizerResult

            return [
                RecognizerResult("A", 2, 6, 0.9),
                RecognizerResult("B", 4, 9, 0.9),
                RecognizerResult("C", 0, 3, 0.9),
            ]

    masked = personal.Analyst(Engine(), "en", ("A", "B", "C"), 0.5).mask("0123456789")
    assert masked == "[c][a][b]9"


@pytest.mark.parametrize(
    ("asked", "error", "says", "fix"),
    [
        ({}, ParamsError, "LOCATION, PERSON, which take a spaCy model", "spacy download en_core_web_lg"),
        ({"model": "en_core_web_lg"}, MissingInput, "en_core_web_lg, which is not installed", "python -m spacy download en_core_web_lg"),
        ({"model": "/tmp"}, MissingInput, "/tmp, which is not installed", "download"),
        ({"entities": ["US_SSN", "SHOE_SIZE"]}, ParamsError, "SHOE_SIZE, which nothing here finds; expected some of .*US_SSN", "edit"),
        ({"entities": ["EMAIL_ADDRESS"]}, ParamsError, "EMAIL_ADDRESS, which nothing.* validate.pii", "edit"),
        ({"entities": ["US_SSN"], "language": "qq"}, ParamsError, "language is 'qq'", "edit"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_refused_before_anything_is_read_with_the_next_command(
    stage: Any, chat: Any, asked: dict[str, Any], error: type[Exception], says: str, fix: str
) -> None:
    stage.write("a.jsonl", chat("hi"))
    with pytest.raises(error, match=says) as caught:
        stage.run(personal=asked)
    assert fix in caught.value.fix  # type: ignore[attr-defined]
    assert not (stage.root / "out").exists()


def test_a_model_for_another_language_is_refused(stage: Any, chat: Any, model: str) -> None:
    stage.write("a.jsonl", chat("hi"))
    with pytest.raises(ParamsError, match=r"is for 'en', validate\.personal\.language is 'de'"):
        stage.run(personal={"model": model, "language": "de"})


def test_without_the_package_the_error_names_the_extra(stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    stage.write("a.jsonl", chat("hi"))
    with pytest.raises(MissingInput) as caught:
        stage.run(personal=PATTERNS)
    assert caught.value.fix == "pip install 'regraft[presidio]'"


def test_off_by_default_and_kinds_are_spelt_as_presidio_spells_them() -> None:
    assert ValidateParams().personal is None
    with pytest.raises(ValidationError):
        Personal(entities=["person"])


def test_nothing_is_fetched(stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    stage.write("a.jsonl", chat("hello") + chat("hello at https://example.com"))
    assert stage.run(personal={**PATTERNS, "entities": [*PATTERNS["entities"], "URL"]}).rows_quarantined == 1
