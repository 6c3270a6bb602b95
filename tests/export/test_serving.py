"""Serving what was exported: the same answers over HTTP as from the files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regraft.cli import run
from regraft.errors import GateRefused, MissingInput
from regraft.export import serving
from regraft.export.serving import Served, serve_check


@contextmanager
def nowhere(_: Path) -> Iterator[str]:
    yield "http://nowhere"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that gives a fixed answer; the model's own is 'yes', stopped."""

    def answering(text: str, reason: str) -> None:
        served = Served(prompt="Hello", answer=text, finish_reason=reason, milliseconds=1)
        monkeypatch.setattr(serving, "find_spec", lambda _: True)
        monkeypatch.setattr(serving, "_server", nowhere)
        monkeypatch.setattr(serving, "_own_answers", lambda *_: [("yes", True)])
        monkeypatch.setattr(serving, "_ask", lambda *_: served)

    return answering


def test_the_models_own_answer_passes(fake: Any) -> None:
    fake("yes", "stop")

    assert [each.answer for each in serve_check(Path(), ["Hello"])] == ["yes"]


@pytest.mark.parametrize(
    ("text", "reason", "said"),
    [("yes<|im_end|>", "stop", "was answered 'yes<|im_end|>'"), ("yes", "length", "ended with length")],
)
def test_an_answer_that_differs_or_does_not_stop_is_refused(fake: Any, text: str, reason: str, said: str) -> None:
    fake(text, reason)

    with pytest.raises(GateRefused) as refusal:
        serve_check(Path(), ["Hello"])
    assert said in refusal.value.message


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "openai" else True)

    with pytest.raises(MissingInput, match="needs openai") as refusal:
        serve_check(Path(), ["Hello"])
    assert refusal.value.fix == "pip install openai, then run it again"


def test_without_check_it_is_said_what_serves(capsys: Any, tmp_path: Path) -> None:
    assert run(["serve", str(tmp_path)]) == 2
    assert "transformers serve" in capsys.readouterr().err


@pytest.mark.service
def test_transformers_server_answers_as_the_exported_files_do(exported: Any, capsys: Any) -> None:
    """Needs the package `openai`."""
    pytest.importorskip("openai")

    assert run(["serve", str(exported.folder), "--check", "--prompt", "where is my lamp", "--prompt", "refund"]) == 0
    assert capsys.readouterr().out.count(" ms)") == 2
