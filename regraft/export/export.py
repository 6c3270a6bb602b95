"""The export: merge the candidates, measure them in a fresh process, publish the best if it passes, else nothing.

data/exports/<identity16>/   a verified export            data/exports/latest   a link to the champion's
data/exports/refused/        certificates of refusals     data/exports/.work/   candidates, while one is made
"""

import logging
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import (
    commit_dir,
    digest_file,
    digest_json,
    hold,
    pretty_json,
    read_json,
    verify_dir,
    write_file,
    write_json,
)
from regraft.errors import Exit, GateRefused, ParamsError, PinMismatch, RegraftError, StageFailed
from regraft.evaluate.holdout import holdout_digest, read_holdout
from regraft.evaluate.params import EvaluateParams
from regraft.export.card import model_card
from regraft.export.certificate import CERTIFICATE, LINEAGE, README, choose, judge, judge_forms, verify_export
from regraft.export.folder import licence_files, licence_name, write_companions, write_tokenizer
from regraft.export.formats import check_forms, make_form
from regraft.export.merge import Plan, merge, plan_merge, read_config
from regraft.export.params import ExportParams, Source, split_source
from regraft.export.publish import point_latest, prune, publish
from regraft.export.report import Candidate, Certificate, ExportReport, Scores
from regraft.export.signature import signing_key
from regraft.export.sources import dequantized, quantized_modules
from regraft.export.survival import Survival, Survived
from regraft.export.tensors import Reader
from regraft.export.verify import Entrant, Job
from regraft.failpoints import failpoint
from regraft.model.adapter import check_adapter
from regraft.model.load import Base, open_base
from regraft.model.params import Quantization

if TYPE_CHECKING:
    from regraft.export.merge import Weights

log = logging.getLogger("regraft")
_REFUSED = "refused"
_FORMAT = 2  # raised when equal inputs would give other bytes


def export(
    params: ExportParams,
    quantization: Quantization,
    evaluate: EvaluateParams,
    *,
    base: Path,
    adapter: Path,
    dataset: Path,
    lineage: dict[str, Any],
    out_root: Path,
    identity: str,
    latest: bool = True,
    champion: str | None = None,
    attention: str = "sdpa",
) -> ExportReport:
    """Merge an adapter into its base, prove the files, and publish them as `out_root/<identity16>`.

    Args:
        params: thresholds, candidates, type of the weights.
        quantization: how the base lay in memory when the adapter was trained.
        evaluate: how answers are made and graded.
        base: output of the stage `model`.
        adapter: folder of the adapter.
        dataset: output of the stage `preprocess`, for its holdout.
        lineage: what made the version (`regraft.lineage`); its section `identity` names adapter, base and tokenizer.
        out_root: folder of all exports.
        identity: the version's identity, 64 hexadecimal digits.
        latest: move `out_root/latest` to this export.
        champion: identity of the champion, whose export is never removed to make room; None where there is none.
        attention: `model.attention`, for the adapter on its training base.

    Raises:
        GateRefused: the merged files differ too much, or nothing could be measured. Earlier exports are untouched.
        PinMismatch: base, tokenizer or adapter are not those that were pinned or registered.
        DamagedArtifact, MissingInput: an input is unfit or not there.
        Busy: another export into `out_root` is running.
        StageFailed: the verifying process died.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", identity):
        raise ParamsError(f"identity: found {identity!r}, expected 64 hexadecimal digits")
    signing_key()  # an unfit one is said before the work
    needed = {identity[:16], (champion or identity)[:16]}
    with hold(out_root / ".work/lock", "the export"):
        opened, checked = open_base(base), check_adapter(adapter)
        _check_lineage(lineage, identity, opened, checked.digest)
        judged = {
            "adapter": checked.digest,
            "base": opened.report.digest,
            "tokenizer": opened.report.tokenizer_digest,
            "holdout": holdout_digest(dataset),
        }
        key = export_key(params, quantization, identity, judged["adapter"], judged["base"], judged["tokenizer"])
        destination = out_root / identity[:16]
        work = out_root / ".work" / key[:16]
        found = _existing(destination, key)
        _sweep(work.parent, None if found else work)
        if found is not None:
            return _finish(found, out_root, params, already=True, latest=latest, needed=needed)

        check_forms(params.forms, opened.folder, opened.tokenizer)
        work.mkdir(exist_ok=True)
        try:
            sources = _sources(params, quantization)
            plans = {
                source: plan_merge(opened.folder, adapter, split_source(source, params.dtype)[1]) for source in sources
            }
            _check_disk([plans[source] for source in sources if not (work / source).is_dir()], dataset, params, work)
            job = Job(
                base=base.absolute(),
                adapter=adapter.absolute(),
                adapter_digest=checked.digest,
                dataset=dataset.absolute(),
                quantization=quantization,
                evaluate=evaluate,
                attention=attention,
                rows=params.rows,
                entrants=[_candidate(source, plans[source], params, quantization, work, opened) for source in sources],
                scratch=work.absolute(),
                out=(work / "scores.json").absolute(),
            )
            failpoint("export.verify")
            scores = _verified(job, work)
            chosen = choose(scores)
            draft = _certificate(params, quantization, opened, judged, lineage, identity, key, scores, chosen)
            forms: dict[str, Path] = {}
            if chosen is not None and draft.verdict.passed and params.forms:
                draft, forms = _forms(draft, chosen, params, plans[chosen.source], job, work)
            certificate = _publish(draft, chosen, opened, lineage, work, out_root, forms)
        except StageFailed:
            raise  # what is merged already is used again
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        report = _finish(certificate, out_root, params, already=False, latest=latest, needed=needed)
        shutil.rmtree(work)
        return report


def _check_lineage(lineage: dict[str, Any], identity: str, base: Base, adapter_digest: str) -> None:
    """Refuse a lineage of another version, and an adapter, base or tokenizer other than the lineage names."""
    section = lineage.get("identity")
    parts = {name: value for name, value in section.items() if name != "digest"} if isinstance(section, dict) else {}
    if digest_json(parts) != identity:
        raise PinMismatch(
            f"the lineage is of version {digest_json(parts) if parts else 'unknown'}, to be exported is {identity}",
            fix="give the lineage.json of the same version",
        )
    found = {"adapter": adapter_digest, "base": base.report.digest, "tokenizer": base.report.tokenizer_digest}
    wrong = [
        f"the {name} has the digest {digest}, the lineage names {parts.get(name)}"
        for name, digest in found.items()
        if parts.get(name) != digest
    ]
    if wrong:
        raise PinMismatch("; ".join(wrong), fix="restore the files, or export the version that belongs to them")


def export_key(
    params: ExportParams, quantization: Quantization, identity: str, adapter: str, base: str, tokenizer: str
) -> str:
    """Return the digest of all that an export's bytes depend on: equal keys, equal exports (sha256 in hexadecimal)."""
    settings = [params.model_dump(mode="json", exclude={"keep"}), quantization.model_dump(mode="json")]
    return digest_json([_FORMAT, identity, adapter, base, tokenizer, settings])


def _existing(destination: Path, key: str) -> Certificate | None:
    if not destination.is_dir():
        return None
    try:
        certificate = verify_export(destination)
    except RegraftError as error:
        log.warning("export: the export that is there is made again: %s", error.message)
        return None
    return certificate if certificate.key == key else None


def _sweep(folder: Path, kept: Path | None) -> None:
    """Remove what killed exports left, but for the one that goes on; the lock says that none of them is running."""
    for path in folder.iterdir():
        if path.is_dir() and path != kept:
            shutil.rmtree(path)


def _sources(params: ExportParams, quantization: Quantization) -> list[Source]:
    """The candidates that make sense: an unquantised base has only its original weights."""
    found = [each for each in params.candidates if each.startswith("original") or quantization.bits != 16]
    return found or ["original"]


def _check_disk(missing: list[Plan], dataset: Path, params: ExportParams, work: Path) -> None:
    """Refuse before the work when candidates and the reference's log-probabilities do not fit beside the exports."""
    vocabulary = 0
    for plan in missing:
        config = read_config(plan.base)
        vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    trained = sum(label != -100 for row in read_holdout(dataset, params.rows).rows for label in row.labels)
    wanted = sum(plan.size for plan in missing) + 4 * trained * vocabulary
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise RegraftError(
            f"the export needs {wanted / 1e6:.1f} MB beside {work.parent.parent}, {free / 1e6:.1f} MB are free",
            fix="free some space, name one candidate in export.candidates, or lower export.rows",
        )


def _candidate(
    source: Source, plan: Plan, params: ExportParams, quantization: Quantization, work: Path, base: Base
) -> Entrant:
    """Merge one candidate into `work`, unless a killed export left it whole."""
    folder = work / source
    name, dtype = split_source(source, params.dtype)
    weights = _weights(name, plan, quantization)
    assumed = quantized_modules(plan, quantization) if name == "dequantized" else None
    beside = work / f"{source}.survival.json"
    try:
        verify_dir(folder)
        layers = [Survived.model_validate(each) for each in read_json(beside)]
    except RegraftError:
        survival, shards = Survival(), work / f"{source}.shards"
        with commit_dir(folder) as temporary:
            merge(plan, temporary, weights=weights, partial=shards, key=source, survival=survival)
            write_companions(plan, temporary, dtype=dtype)
            if base.extended is not None:
                write_tokenizer(plan, temporary, tokenizer=base.extended)
            layers = survival.layers
            write_json(beside, [each.model_dump() for each in layers])
        shutil.rmtree(shards, ignore_errors=True)
        failpoint("export.merged")
    return Entrant(source=source, folder=folder.absolute(), assumed=assumed, survival=layers)


def _weights(name: str, plan: Plan, quantization: Quantization) -> "Weights":
    """The base's weights that a candidate is merged into."""
    from regraft.model.load import compute_dtype

    if name != "dequantized":
        return Reader.blocks
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports at import that it has no hub kernels
    return dequantized(plan, quantization, compute_dtype(quantization))


def _forms(
    certificate: Certificate, chosen: Candidate, params: ExportParams, plan: Plan, job: Job, work: Path
) -> tuple[Certificate, dict[str, Path]]:
    """Make the other forms of the chosen candidate, measure them in a fresh process, and add their checks."""
    entrants: list[Entrant] = []
    folders: dict[str, Path] = {}
    weights = _weights(split_source(chosen.source, params.dtype)[0], plan, job.quantization)
    for form in params.forms:
        folder = work / f"form-{form}"
        layers = make_form(form, work / chosen.source, plan, folder, weights=weights)
        folders[form] = folder
        entrants.append(
            Entrant(source=chosen.source, folder=folder.absolute(), assumed=None, survival=layers, form=form)
        )
    scores = _verified(job.model_copy(update={"entrants": entrants}), work)
    verdict = judge_forms(params, certificate.verdict, scores)
    environment = certificate.environment | scores.environment
    found = {"forms": scores.candidates, "verdict": verdict, "environment": environment}
    return certificate.model_copy(update=found), folders


def _verified(job: Job, work: Path) -> Scores:
    """Run the verification in a process of its own and read its scores."""
    file = work / "job.json"
    write_file(file, job.model_dump_json().encode())
    job.out.unlink(missing_ok=True)
    last: deque[str] = deque(maxlen=3)
    command = [sys.executable, "-m", "regraft.export.verify", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                last.append(line.strip())
                log.info("%s", line.rstrip())
    if process.returncode != 0 or not job.out.is_file():
        raise StageFailed(
            f"the verification ended with code {process.returncode}: {' / '.join(last) or 'it said nothing'}",
            fix="run the same command again; what is merged already is used again",
            stage="export",
            code=process.returncode if process.returncode in tuple(Exit) else Exit.FAILED,
        )
    return Scores.load(job.out)


def _publish(
    certificate: Certificate,
    chosen: Candidate | None,
    base: Base,
    lineage: dict[str, Any],
    work: Path,
    out_root: Path,
    forms: dict[str, Path],
) -> Certificate:
    """Put the chosen candidate in its place, or keep the certificate of a refusal and raise."""
    name = certificate.identity[:16]
    if not certificate.verdict.passed or chosen is None:
        refusal = out_root / _REFUSED / f"{name}.json"
        certificate.save(refusal)
        raise GateRefused(
            "the merged model differs from the adapter on its training base: "
            + " ".join(certificate.verdict.reasons)
            + f" Nothing was published; the figures are in {refusal}",
            fix="compare the candidates' figures there; merged weights in fp32, or another adapter, may be nearer",
        )
    extras = {path.name: path.read_bytes() for path in licence_files(base.folder)}
    card = model_card(certificate, lineage, licence=licence_name(base.folder), name=f"{base.name}, {name}")
    extras |= {README: card, LINEAGE: pretty_json(lineage)}
    certificate = publish(work / chosen.source, extras, certificate, out_root / name, forms)
    verify_export(out_root / name)
    return certificate


def _certificate(
    params: ExportParams,
    quantization: Quantization,
    base: Base,
    judged: dict[str, str],
    lineage: dict[str, Any],
    identity: str,
    key: str,
    scores: Scores,
    chosen: Candidate | None,
) -> Certificate:
    judged = {**judged, "merged": chosen.digest} if chosen else judged
    return Certificate(
        identity=identity,
        key=key,
        verdict=judge(params, scores, chosen, judged),
        chosen=chosen.source if chosen else None,
        dtype=split_source(chosen.source, params.dtype)[1] if chosen else params.dtype,
        base={name: getattr(base.report, name) for name in ("source", "name", "revision", "digest")},
        quantization=quantization.model_dump(mode="json"),
        adapter_digest=judged["adapter"],
        tokenizer_digest=judged["tokenizer"],
        lineage_digest=digest_json(lineage),
        reference=scores.reference,
        candidates=scores.candidates,
        environment=scores.environment,
        files={},
    )


def _finish(
    certificate: Certificate, out_root: Path, params: ExportParams, *, already: bool, latest: bool, needed: set[str]
) -> ExportReport:
    """Move the pointer if it is to move, remove what `keep` leaves no room for, and report."""
    name = certificate.identity[:16]
    if latest:
        point_latest(out_root, name)
    (out_root / _REFUSED / f"{name}.json").unlink(missing_ok=True)
    removed = prune(out_root, params.keep, needed)
    parity = next(each.parity for each in certificate.candidates if each.source == certificate.chosen)
    assert certificate.chosen is not None
    assert parity is not None
    log.info("export: %s %s", "already exported:" if already else "published", out_root / name)
    return ExportReport(
        identity=certificate.identity,
        folder=name,
        already_exported=already,
        certificate_digest=digest_file(out_root / name / CERTIFICATE),
        chosen=certificate.chosen,
        parity=parity,
        reference_exact_match=certificate.reference.exact_match,
        size=sum(entry.size for entry in certificate.files.values()),
        removed=removed,
    )
