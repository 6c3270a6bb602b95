"""The verification, in a process of its own: `python -m regraft.export.verify JOB`.

It loads each candidate's files from disk with transformers, without any adapter code, and compares them with the
adapter on the base that it was trained on: distributions over held-out answers, greedy answers, exact match. What the
merging process held in memory cannot help a damaged file here. It decides nothing: `regraft.export.certificate` does.
"""

import argparse
import gc
import logging
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from regraft.artifacts import verify_dir
from regraft.errors import DamagedArtifact, Exit, PinMismatch, RegraftError
from regraft.evaluate.params import EvaluateParams
from regraft.export.genai import PACKAGES as ONNX_PACKAGES
from regraft.export.params import Form, Source
from regraft.export.report import Candidate, Parity, Reference, Scores
from regraft.export.survival import Survived
from regraft.failpoints import failpoint
from regraft.model.params import Quantization

log = logging.getLogger("regraft")
GGUF_PACKAGES = ("gguf", "llama-cpp-python")
PACKAGES = ("bitsandbytes", "peft", "safetensors", "tokenizers", "torch", "transformers")


class Entrant(BaseModel):
    """One candidate's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    folder: Path
    assumed: list[str] | None
    """Modules that the merge took for quantised; None where it did not matter."""
    survival: list[Survived] = Field(default_factory=list)
    """What the merge measured; it goes into the certificate."""
    form: Form | None = None


class Job(BaseModel):
    """What to verify; a file of it is the process's only input besides the folders that it names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path
    """Output of the stage `model`."""
    adapter: Path
    adapter_digest: str
    dataset: Path
    """Output of the stage `preprocess`."""
    quantization: Quantization
    evaluate: EvaluateParams
    attention: str = "sdpa"
    """`model.attention`; its kernels differ by rounding only, but not every architecture has each."""
    rows: int
    """Held-out rows to compare, at most."""
    entrants: list[Entrant]
    scratch: Path
    """A folder for the reference's log-probabilities: 4 bytes x positions x vocabulary."""
    out: Path
    """Gets the scores as JSON."""


def verify(job: Job) -> Scores:
    """Measure the reference and every candidate.

    Raises:
        PinMismatch: the base or the adapter is not the one of the job.
        DamagedArtifact, MissingInput: the adapter or the holdout is unfit.
    """
    import torch

    from regraft.evaluate.holdout import read_holdout
    from regraft.evaluate.score import answer_rows
    from regraft.export.parity import keep_reference, log_probabilities
    from regraft.model.adapter import adapter_digest, load_adapter
    from regraft.model.load import device, load_model, load_tokenizer, open_base

    if job.evaluate.threads is not None:
        torch.set_num_threads(job.evaluate.threads)
    if (found := adapter_digest(job.adapter)) != job.adapter_digest:
        raise PinMismatch(f"the adapter {job.adapter} changed: its digest is {found}, it was {job.adapter_digest}")
    base, holdout = open_base(job.base), read_holdout(job.dataset, job.rows)
    rows = holdout.rows

    model: Any = load_model(base, job.quantization, training=False, attention=job.attention)
    quantized = _quantized(model)
    model, tokenizer = load_adapter(model, job.adapter), load_tokenizer(base)
    reference_file = job.scratch / "reference.f32"
    positions = keep_reference(reference_file, log_probabilities(model, rows, job.evaluate))
    answers = answer_rows(model, tokenizer, rows, job.evaluate, "adapter on its base")
    reference = Reference(
        rows=len(rows),
        held_out=holdout.held_out,
        holdout_digest=holdout.digest,
        positions=positions,
        loss=_mean_loss(answers),
        exact_match=sum(answer.exact for answer in answers) / len(answers),
        quantized_modules=quantized,
    )
    del model
    _free()
    candidates = []
    for entrant in job.entrants:
        candidates.append(_measure(entrant, job, rows, answers, quantized, reference_file))
        _free()
        failpoint("export.verified")
    reference_file.unlink()
    environment = {name: version(name) for name in PACKAGES}
    for kind, packages in (("gguf", GGUF_PACKAGES), ("onnx", ONNX_PACKAGES)):
        if any((entrant.form or "").startswith(kind) for entrant in job.entrants):
            with suppress(PackageNotFoundError):  # then it was not measured, and the form says so
                environment |= {name: version(name) for name in packages}
    environment |= {"python": platform.python_version(), "device": _device_name(device())}
    environment["threads"] = str(torch.get_num_threads())
    return Scores(reference=reference, candidates=candidates, environment=dict(sorted(environment.items())))


def _measure(
    entrant: Entrant, job: Job, rows: list[Any], answers: list[Any], quantized: list[str], reference: Path
) -> Candidate:
    """Load one candidate from disk and compare; whatever is wrong with its files is its `error`."""
    from regraft.evaluate.score import answer_rows
    from regraft.export.parity import compare, log_probabilities

    digest, error, parity = "", None, None
    try:
        digest = verify_dir(entrant.folder)
        if entrant.assumed is not None:
            _check_assumed(entrant.assumed, quantized)
        if entrant.form is not None and entrant.form.startswith("gguf"):
            distance, mine = _by_llama(entrant.folder, job, rows, reference)
        elif entrant.form is not None and entrant.form.startswith("onnx"):
            distance, mine = _by_genai(entrant.folder, job, rows, reference)
        else:
            model, tokenizer = _loaded(entrant, job)
            distance = compare(reference, log_probabilities(model, rows, job.evaluate))
            mine = answer_rows(model, tokenizer, rows, job.evaluate, f"merged into the {entrant.source} base")
        same = sum((a.generated, a.stopped) == (b.generated, b.stopped) for a, b in zip(mine, answers, strict=True))
        parity = Parity(
            positions=distance.positions,
            top1_agreement=distance.top1_agreement,
            mean_kl=distance.mean_kl,
            max_kl=distance.max_kl,
            loss=_mean_loss(mine),
            exact_match=sum(answer.exact for answer in mine) / len(mine),
            same_answers=same / len(mine),
        )
    except (RegraftError, OSError, ValueError, RuntimeError) as failure:  # a file that cannot be loaded is a finding
        error = f"{type(failure).__name__}: {failure}".splitlines()[0][:500].replace(f"{entrant.folder}/", "")
        log.warning("export: the merge into the %s base cannot be used: %s", entrant.source, error)
    return Candidate(
        source=entrant.source, digest=digest, error=error, parity=parity, survival=entrant.survival, form=entrant.form
    )


def _by_llama(folder: Path, job: Job, rows: list[Any], reference: Path) -> tuple[Any, list[Any]]:
    """Let llama.cpp tokenise, score and answer."""
    from regraft.evaluate.score import stop_tokens
    from regraft.export.llama import LlamaCpp
    from regraft.export.parity import compare
    from regraft.model.load import load_tokenizer, open_base

    tokenizer = load_tokenizer(open_base(job.base))
    model = LlamaCpp(folder, rows, job.evaluate)
    model.check_tokens(rows, tokenizer)
    distance = compare(reference, model.log_probabilities(rows, job.evaluate))
    return distance, model.answers(rows, tokenizer, stop_tokens(None, tokenizer), job.evaluate)


def _by_genai(folder: Path, job: Job, rows: list[Any], reference: Path) -> tuple[Any, list[Any]]:
    """Let onnxruntime-genai tokenise, score and answer; it ends answers by its own settings."""
    from regraft.export.genai import Genai
    from regraft.export.parity import compare
    from regraft.model.load import load_tokenizer, open_base

    tokenizer = load_tokenizer(open_base(job.base))
    model = Genai(folder, job.evaluate)
    model.check_tokens(rows, tokenizer)
    distance = compare(reference, model.log_probabilities(rows, job.evaluate))
    return distance, model.answers(rows, tokenizer, job.evaluate)


def _loaded(entrant: Entrant, job: Job) -> tuple[Any, Any]:
    if entrant.form == "adapter":
        from regraft.model.adapter import load_adapter
        from regraft.model.load import load_model, load_tokenizer, open_base

        base = open_base(job.base)
        model = load_model(base, job.quantization, training=False, attention=job.attention)
        return load_adapter(model, entrant.folder), load_tokenizer(base)
    return load_merged(entrant.folder)


def load_merged(folder: Path) -> tuple[Any, Any]:
    """Load a merged model and its tokenizer as a user would: from files alone, every weight found and none left over.

    Raises:
        DamagedArtifact: a weight is missing, foreign or of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.model.load import device, mend_4bit

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map={"": device()},
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    problems = [f"{kind}: {', '.join(sorted(map(str, found[kind]))[:5])}" for kind in sorted(found) if found[kind]]
    if problems:
        raise DamagedArtifact(f"{folder} does not load whole: " + "; ".join(problems))
    mend_4bit(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return model.eval(), tokenizer


def _quantized(model: Any) -> list[str]:
    kinds = ("Linear4bit", "Linear8bitLt")
    return sorted(name for name, module in model.named_modules() if type(module).__name__ in kinds)


def _check_assumed(assumed: list[str], quantized: list[str]) -> None:
    """Compare the layers that the merge took for quantised with those that are; files may leave leading names out."""
    pairs = {
        name: [q for q in quantized if q == name or q.endswith(f".{name}") or name.endswith(f".{q}")]
        for name in assumed
    }
    wrong = [name for name, found in pairs.items() if len(found) != 1]
    missed = sorted(set(quantized) - {found[0] for found in pairs.values() if found})
    if wrong or missed:
        raise DamagedArtifact(
            f"the merge misjudged which layers were quantised: {len(wrong)} were not ({', '.join(wrong[:3])}), "
            f"{len(missed)} were missed ({', '.join(missed[:3])})"
        )


def _mean_loss(answers: list[Any]) -> float | None:
    tokens = sum(answer.tokens for answer in answers)
    loss = sum(answer.loss for answer in answers) / tokens if tokens else float("nan")
    return loss if abs(loss) < float("inf") else None


def _free() -> None:
    """Give the last model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Verify one job and return the exit code; the scores go to the job's `out`."""
    parser = argparse.ArgumentParser(prog="python -m regraft.export.verify", description=__doc__)
    parser.add_argument("job", type=Path, help="a JSON file, see `regraft.export.verify.Job`")
    job = Job.model_validate_json(parser.parse_args(arguments).job.read_bytes())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _end_with(os.getppid())
    try:
        _hide_bars()
        verify(job).save(job.out)
    except RegraftError as error:
        print(error, file=sys.stderr)  # noqa: T201 - this process is a command
        return error.exit_code
    return Exit.DONE


def _hide_bars() -> None:
    """Turn off transformers' progress bars: the export passes this process's lines on to a log."""
    from transformers.utils import logging as bars

    bars.disable_progress_bar()


def _end_with(parent: int) -> None:
    """End this process when the export that started it is gone: nobody would read the scores."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(Exit.FAILED)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


if __name__ == "__main__":
    sys.exit(main())
