"""The smoke test of an export as it will be served: OpenAI's protocol, the template and the stop tokens as trained.

A server (transformers' own, vLLM's, or llama.cpp's on the file in GGUF) is started in a process of its own on the loopback
interface, asked over HTTP, and its answers are compared with those that the merged weights give when they are rendered and
decoded here. vLLM's command line is as its documentation has it; it was not tried (it wants a GPU).
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from regraft.errors import GateRefused, MissingInput, ServiceUnavailable
from regraft.export.gguf import MODEL
from regraft.export.params import Server

log = logging.getLogger("regraft")
_PATIENCE = 120  # seconds for the server to load the model and to answer once


@dataclass(frozen=True)
class _Kind:
    """How a server is started: what it needs, where it says that it is ready, and its command for a folder."""

    needed: tuple[str, ...]
    packages: str
    ready: str
    command: Callable[[Path], list[str]]
    asked: dict[str, Any] = field(default_factory=dict)
    """What a request says beside OpenAI's protocol, so that answers are greedy."""


def _gguf(folder: Path) -> list[str]:
    file = folder / "gguf-f16" / MODEL
    if not file.is_file():
        raise MissingInput(
            f"{folder} has no gguf-f16/{MODEL}", fix="add gguf-f16 to `export.forms` and run `regraft export`"
        )
    return ["llama_cpp.server", "--model", str(file), "--n_ctx", "0"]


_KINDS = {
    Server.TRANSFORMERS: _Kind(
        needed=("fastapi", "uvicorn", "openai"),  # transformers.utils.is_serve_available
        packages="fastapi uvicorn openai",
        ready="/health",
        command=lambda folder: ["transformers.cli.transformers", "serve", str(folder)],
    ),
    Server.VLLM: _Kind(
        needed=("vllm",),
        packages="vllm",
        ready="/health",
        command=lambda folder: ["vllm.entrypoints.cli.main", "serve", str(folder)],
    ),
    Server.LLAMA_CPP: _Kind(
        needed=("llama_cpp", "sse_starlette", "starlette_context", "fastapi", "uvicorn"),
        packages="'llama-cpp-python[server]'",
        ready="/v1/models",
        command=_gguf,
        asked={"repeat_penalty": 1.0},  # its server's default is 1.1: other answers than those that were measured
    ),
}


class Served(BaseModel):
    """What a served export answered."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str
    finish_reason: str | None
    milliseconds: int
    """A measurement: of this machine, at this time."""


def serve_check(
    folder: Path, prompts: Sequence[str], server: Server = Server.TRANSFORMERS, *, max_new_tokens: int = 48
) -> list[Served]:
    """Serve an export, ask it, and compare its answers with the merged weights' own greedy ones.

    Args:
        folder: an export or a merge, with a tokenizer that has a chat template; for llama.cpp with the form gguf-f16.
        prompts: what the user says, one conversation each.
        server: whose.
        max_new_tokens: at which an answer is cut.

    Raises:
        MissingInput: the server's packages are not installed, or the folder has not the form that it serves.
        ServiceUnavailable: the server did not start or answer.
        GateRefused: an answer differs, shows a special token, or did not stop where the model stops.
    """
    kind = _KINDS[server]
    missing = [name for name in kind.needed if find_spec(name) is None]
    if missing:
        raise MissingInput(
            f"the server of {server} needs {', '.join(missing)}", fix=f"pip install {kind.packages}, then run it again"
        )
    command = kind.command(folder.resolve())
    expected = _own_answers(folder, prompts, max_new_tokens)
    with _running(server, command) as url:
        served = [_ask(url, folder, prompt, max_new_tokens, kind.asked) for prompt in prompts]
    problems = []
    for found, (text, stopped) in zip(served, expected, strict=True):
        if found.answer != text:
            problems.append(f"{found.prompt[:40]!r} was answered {found.answer[:60]!r}, the model says {text[:60]!r}")
        if (found.finish_reason == "stop") != stopped:
            problems.append(f"{found.prompt[:40]!r} ended with {found.finish_reason}, the model stops: {stopped}")
    if problems:
        raise GateRefused(
            "served otherwise than trained: " + "; ".join(problems[:5]),
            fix="look at chat_template.jinja and generation_config.json in the export",
        )
    return served


def _own_answers(folder: Path, prompts: Sequence[str], most: int) -> list[tuple[str, bool]]:
    import torch

    from regraft.chat import render_prompt
    from regraft.evaluate.score import stop_tokens
    from regraft.export.verify import load_merged

    model, tokenizer = load_merged(folder)
    stop, answers = stop_tokens(model, tokenizer), []
    for prompt in prompts:
        ids = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": prompt}])], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=sorted(stop),
                pad_token_id=min(stop),
            )[0, ids.shape[1] :].tolist()
        answers.append((tokenizer.decode(out, skip_special_tokens=True), bool(out) and out[-1] in stop))
    return answers


@contextmanager
def _running(server: Server, command: Sequence[str]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log_file = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would stop a server that says much
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},  # one looks for a newer version of itself
        stdout=subprocess.DEVNULL,
        stderr=log_file,
    )
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while not _answers(f"{url}{_KINDS[server].ready}"):
            if process.poll() is not None or time.monotonic() - began > _PATIENCE:
                log_file.seek(0)
                said = log_file.read().decode(errors="replace").strip().splitlines()[-1:]
                raise ServiceUnavailable(f"the server of {server} did not start: {' '.join(said) or 'it said nothing'}")
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()
        log_file.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _ask(url: str, folder: Path, prompt: str, most: int, more: dict[str, Any]) -> Served:
    body = {
        "model": str(folder.resolve()),
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": most,
        "stream": False,
        **more,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            content: Any = json.load(reply)
        choice = content["choices"][0]
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        said = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else str(error)
        raise ServiceUnavailable(f"the server did not answer {prompt[:40]!r}: {said}") from error
    milliseconds = round((time.monotonic() - began) * 1000)
    return Served(prompt=prompt, answer=text, finish_reason=reason, milliseconds=milliseconds)
