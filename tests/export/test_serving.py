"""Serving what was exported: the same answers over HTTP as from the files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.cli import run
from regraft.errors import GateRefused, MissingInput, ServiceUnavailable
from regraft.export import serving
from regraft.export.params import Server
from regraft.export.serving import Served, serve_check


@contextmanager
def nowhere(*_: object) -> Iterator[str]:
    yield "http://nowhere"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that gives a fixed answer; the model's own is 'yes', stopped."""

    def answering(text: str, reason: str) -> None:
        served = Served(prompt="Hello", answer=text, finish_reason=reason, milliseconds=1)
        monkeypatch.setattr(serving, "find_spec", lambda _: True)
        monkeypatch.setattr(serving, "_running", nowhere)
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
    assert refusal.value.fix == "pip install fastapi uvicorn openai, then run it again"


def test_llama_cpps_server_gets_the_file_in_f16_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda _: True)
    (tmp_path / "gguf-q8_0").mkdir()
    (tmp_path / "gguf-q8_0/model.gguf").touch()

    with pytest.raises(MissingInput, match=r"has no gguf-f16/model\.gguf"):
        serve_check(tmp_path, ["Hello"], Server.LLAMA_CPP)


@pytest.mark.parametrize("server", Server)
def test_a_server_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda _: True)
    monkeypatch.setattr(serving, "_own_answers", lambda *_: [("yes", True)])
    (tmp_path / "gguf-f16").mkdir()
    (tmp_path / "gguf-f16/model.gguf").touch()
    kind = replace(serving._KINDS[server], command=lambda _: ["regraft.no_such_server"])
    monkeypatch.setitem(serving._KINDS, server, kind)

    with pytest.raises(ServiceUnavailable, match=f"the server of {server} did not start: .*no_such_server"):
        serve_check(tmp_path, ["Hello"], server)


def test_without_check_it_is_said_what_serves(capsys: Any, tmp_path: Path) -> None:
    assert run(["serve", str(tmp_path)]) == 2
    assert "transformers serve" in capsys.readouterr().err


@pytest.mark.service
def test_transformers_server_answers_as_the_exported_files_do(exported: Any, capsys: Any) -> None:
    """Needs the package `openai`."""
    pytest.importorskip("openai")

    assert run(["serve", str(exported.folder), "--check", "--prompt", "where is my lamp", "--prompt", "refund"]) == 0
    assert capsys.readouterr().out.count(" ms)") == 2


@pytest.mark.service
def test_llama_cpps_server_answers_as_the_file_does(
    exported: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs `make llama-cpp` and `llama-cpp-python[server]`. The tiny model's answers are near ties, so the file is asked."""
    pytest.importorskip("llama_cpp.server.app")
    from llama_cpp import Llama

    clone = exported.copy(tmp_path / "clone")
    folder = clone.exports / small.export_here(clone.root, forms=["gguf-f16"], **small.LAX).folder
    prompts = ["where is my lamp", "refund"]

    def own(folder: Path, prompts: list[str], most: int) -> list[tuple[str, bool]]:
        model = Llama(str(folder / "gguf-f16/model.gguf"), n_ctx=0, verbose=False)
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        choices = [
            model.create_chat_completion(messages, max_tokens=most, temperature=0)["choices"][0] for messages in asked
        ]
        return [(each["message"]["content"], each["finish_reason"] == "stop") for each in choices]

    monkeypatch.setattr(serving, "_own_answers", own)

    assert run(["serve", str(folder), "--check", "--server", "llama.cpp", *_asking(prompts)]) == 0
    assert capsys.readouterr().out.count(" ms)") == 2

    monkeypatch.setattr(serving, "_own_answers", lambda *_: [("something else", True)] * 2)
    assert run(["serve", str(folder), "--check", "--server", "llama.cpp", *_asking(prompts)]) == 3


def _asking(prompts: list[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]
