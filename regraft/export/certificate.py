"""The certificate: the choice between candidates, the verdict, and the check of an export anywhere, offline."""

import math
import re
from pathlib import Path

from regraft.artifacts import MANIFEST, read_json, verify_dir
from regraft.errors import DamagedArtifact, MissingInput, RegraftError
from regraft.export.params import ExportParams
from regraft.export.report import Candidate, Certificate, FileEntry, Reference, Scores
from regraft.export.survival import overall, table
from regraft.export.tensors import catalogue
from regraft.gates.verdict import Check, Verdict, at_least, at_most, decide, no_evidence

CERTIFICATE = "certificate.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
README = "README.md"
LINEAGE = "lineage.json"
_UNLISTED = {MANIFEST, SUMS, SIGNATURE, CERTIFICATE}
_REQUIRED = ("config.json", "generation_config.json", README, LINEAGE)
FEW_BITS = ("nf4", "int8", "gguf-q8_0", "gguf-q4_k_m", "onnx-int8", "onnx-int4")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def choose(scores: Scores) -> Candidate | None:
    """Return the candidate with the smallest mean divergence from the reference; the first of equals."""
    best, smallest = None, math.inf
    for each in scores.candidates:
        if each.parity is not None and each.parity.mean_kl is not None and each.parity.mean_kl < smallest:
            best, smallest = each, each.parity.mean_kl
    return best


def judge(params: ExportParams, scores: Scores, chosen: Candidate | None, judged: dict[str, str]) -> Verdict:
    """Decide whether the chosen candidate behaves like the adapter on the base that it was trained on."""
    if chosen is None or chosen.parity is None:
        why = "; ".join(f"{each.source}: {each.error or 'not finite'}" for each in scores.candidates)
        return decide("export", [no_evidence(f"no merged model could be measured ({why})")], judged)
    return decide("export", checks(params, scores.reference, chosen), judged)


def judge_forms(params: ExportParams, verdict: Verdict, scores: Scores) -> Verdict:
    """Add the checks of the other forms to a verdict: one that fails, or could not be measured, is a no."""
    found = list(verdict.checks)
    for each in scores.candidates:
        if each.parity is None:
            found.append(no_evidence(f"the form {each.form} could not be measured ({each.error or 'not finite'})"))
        else:
            found += checks(params, scores.reference, each)
    return decide("export", found, verdict.judged)


def checks(params: ExportParams, reference: Reference, found: Candidate) -> list[Check]:
    """Compare a candidate's or a form's figures with the thresholds; forms of few bits have their own."""
    parity, few = found.parity, found.form in FEW_BITS
    assert parity is not None
    prefix, what = (f"{found.form}.", f"the form {found.form}") if found.form else ("", "the merged model")
    survived = overall(found.survival)
    result = []
    if survived is not None:
        result.append(
            at_least(
                f"{prefix}delta_survival",
                survived,
                params.min_delta_survival,
                f"Cosine of the stored change with the one that was learnt (least left in {table(found.survival)})",
            )
        )
    return [
        *result,
        at_least(
            f"{prefix}top1_agreement",
            parity.top1_agreement,
            params.min_form_top1_agreement if few else params.min_top1_agreement,
            f"Share of tokens on which {what} agrees with the adapter",
            rows=reference.rows,
        ),
        at_most(
            f"{prefix}mean_kl",
            math.nan if parity.mean_kl is None else parity.mean_kl,
            params.max_form_mean_kl if few else params.max_mean_kl,
            f"Mean divergence of {what} from the adapter on its training base, in nats",
            rows=reference.rows,
        ),
        at_most(
            f"{prefix}exact_match_drop",
            reference.exact_match - parity.exact_match,
            params.max_exact_match_drop,
            f"Drop of exact match ({reference.exact_match:.4f} with the adapter, {parity.exact_match:.4f} with {what})",
            rows=reference.rows,
        ),
    ]


def sums(files: dict[str, FileEntry]) -> bytes:
    """Return a SHA256SUMS file (GNU coreutils; names without line breaks or backslashes)."""
    return "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items())).encode()


def verify_export(folder: Path) -> Certificate:
    """Check an exported folder, wherever it lies: bytes, sums, certificate and structure. Nothing is loaded.

    Raises:
        MissingInput: there is no export, or not a whole one.
        DamagedArtifact: something differs; the message names all of it.
    """
    verify_dir(folder)
    listed = {name: FileEntry(**entry) for name, entry in read_json(folder / MANIFEST)["files"].items()}
    missing = [name for name in (*_REQUIRED, SUMS, CERTIFICATE) if name not in listed]
    missing += [] if any(name in listed for name in _TOKENIZERS) else [" or ".join(_TOKENIZERS)]
    if missing:
        raise MissingInput(f"{folder} is not an export: it has no {', '.join(missing)}")
    certificate = Certificate.load(folder / CERTIFICATE)
    problems = []
    if certificate.files != {name: entry for name, entry in listed.items() if name not in _UNLISTED}:
        problems.append(f"{CERTIFICATE} lists other files or digests than the folder holds")
    if (folder / SUMS).read_bytes() != sums(
        {name: entry for name, entry in listed.items() if name not in (SUMS, SIGNATURE, MANIFEST)}
    ):
        problems.append(f"{SUMS} lists other files or digests than the folder holds")
    if not certificate.verdict.passed or certificate.chosen is None:
        problems.append(f"{CERTIFICATE} holds a verdict that did not pass")
    if not re.fullmatch(r"[0-9a-f]{64}", certificate.identity):
        problems.append(f"{CERTIFICATE} names the identity {certificate.identity!r}, expected 64 hexadecimal digits")
    try:
        weights = {file for file, _ in catalogue(folder).values()}
        foreign = sorted(name for name in listed if _is_weight(name) and name not in weights)
        problems += [f"{name} belongs to no index" for name in foreign]
    except RegraftError as error:
        problems.append(error.message)
    if problems:
        raise DamagedArtifact(f"{folder} is not a verified export: " + "; ".join(problems), fix="regraft export")
    return certificate


def _is_weight(name: str) -> bool:
    """Weights of the merged model itself; other forms lie in folders."""
    return name.endswith(".safetensors") and "/" not in name
