"""The certificate: the choice between candidates, the verdict, and the check of an export anywhere, offline."""

import math
import re
from pathlib import Path

from regraft.artifacts import MANIFEST, read_json, verify_dir
from regraft.errors import DamagedArtifact, MissingInput, RegraftError
from regraft.export.params import ExportParams
from regraft.export.report import Candidate, Certificate, FileEntry, Scores
from regraft.export.tensors import catalogue
from regraft.gates.verdict import Verdict, at_least, at_most, decide, no_evidence

CERTIFICATE = "certificate.json"
SUMS = "SHA256SUMS"
README = "README.md"
LINEAGE = "lineage.json"
_UNLISTED = {MANIFEST, SUMS, CERTIFICATE}
_REQUIRED = ("config.json", "generation_config.json", README, LINEAGE)
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
    parity, reference = chosen.parity, scores.reference
    drop = reference.exact_match - parity.exact_match
    return decide(
        "export",
        [
            at_least(
                "top1_agreement",
                parity.top1_agreement,
                params.min_top1_agreement,
                "Share of tokens on which the merged model agrees with the adapter",
                rows=reference.rows,
            ),
            at_most(
                "mean_kl",
                math.nan if parity.mean_kl is None else parity.mean_kl,
                params.max_mean_kl,
                "Mean divergence from the adapter on its training base, in nats",
                rows=reference.rows,
            ),
            at_most(
                "exact_match_drop",
                drop,
                params.max_exact_match_drop,
                f"Drop of exact match ({reference.exact_match:.4f} with the adapter, {parity.exact_match:.4f} merged)",
                rows=reference.rows,
            ),
        ],
        judged,
    )


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
        {name: entry for name, entry in listed.items() if name not in (SUMS, MANIFEST)}
    ):
        problems.append(f"{SUMS} lists other files or digests than the folder holds")
    if not certificate.verdict.passed or certificate.chosen is None:
        problems.append(f"{CERTIFICATE} holds a verdict that did not pass")
    if not re.fullmatch(r"[0-9a-f]{64}", certificate.identity):
        problems.append(f"{CERTIFICATE} names the identity {certificate.identity!r}, expected 64 hexadecimal digits")
    try:
        weights = {file for file, _ in catalogue(folder).values()}
        foreign = sorted(name for name in listed if name.endswith(".safetensors") and name not in weights)
        problems += [f"{name} belongs to no index" for name in foreign]
    except RegraftError as error:
        problems.append(error.message)
    if problems:
        raise DamagedArtifact(f"{folder} is not a verified export: " + "; ".join(problems), fix="regraft export")
    return certificate
