"""All gates of one run, from the folders that the stages left: one verdict, bound to digests."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from regraft.artifacts import MANIFEST, digest_file, dir_digest, read_json, verify_dir
from regraft.errors import DamagedArtifact, MissingInput
from regraft.evaluate.answers import Answer, read_answers
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import BASE, EvaluateReport
from regraft.evaluate.store import Stored, scores
from regraft.gates import comparison, data, drift, supervision, training
from regraft.gates.params import ComparisonGate, GatesParams
from regraft.gates.profile import NAME as PROFILE
from regraft.gates.profile import Profile, profile, read_profile
from regraft.gates.verdict import Check, Verdict, closed, decide, no_evidence, refuse, same
from regraft.layout import Layout
from regraft.model.params import Quantization
from regraft.model.report import BaseReport
from regraft.preprocess.report import PreprocessReport
from regraft.train.report import TrainReport
from regraft.validate.report import ValidateReport

RUN = "run"
CHALLENGER = "challenger"
NONE = "none"
"""What `judged["champion"]` is where there is no champion."""


@dataclass(frozen=True)
class Champion:
    """The adapter in use, and what is known about its answers."""

    adapter: str
    """Its digest."""
    answers: Path
    """The answers that were registered with it: on the rows that it was judged on."""
    scored: Stored | None
    """Its score on the present holdout. None where it is for another base than the present one and cannot be scored
    here: then its registered answers stand in, on the rows that both have answered."""
    report: Path | None = None
    """The evaluation's report that was registered with the answers; asked for where they stand in."""
    label: str = "the champion"
    """How messages call it."""
    profile: Path | None = None
    """What the rows were like that it learnt from."""
    forgets: bool = False
    """It was trained on rows that are to be forgotten: one that is not worse replaces it."""


def champion_evidence(
    layout: Layout,
    params: EvaluateParams,
    quantization: Quantization,
    *,
    adapter: Path,
    base: str,
    answers: Path,
    label: str = "the champion",
) -> Champion:
    """Gather what the comparison needs about the champion; scores it on the present holdout if that was not done yet.

    Args:
        layout: the clone, with the stages `model` and `preprocess` up to date.
        params: the section `evaluate`.
        quantization: `model.quantization`.
        adapter: the champion's adapter, fetched and verified.
        base: digest of the base that it was trained on.
        answers: the `answers.parquet` that was registered with it; `reports/evaluate.json` and `profile.json` lie
            next to it.
        label: how messages call it.

    Raises:
        StageFailed: scoring ended with an error.
    """
    from regraft.model.adapter import adapter_digest

    present = BaseReport.load(layout.stage("model") / "report.json").digest
    scored = scores(layout, params, quantization, adapter) if base == present else None
    report = answers.parent / "reports/evaluate.json"
    return Champion(
        adapter=adapter_digest(adapter),
        answers=answers,
        scored=scored,
        report=report,
        label=label,
        profile=answers.parent / PROFILE,
    )


def judge_run(layout: Layout, params: GatesParams, champion: Champion | None) -> Verdict:
    """Ask the gates data, drift, freshness, supervision, training and comparison about the present run; join the answers.

    Writes nothing; freshness asks the clock. The verdict is about the adapter in `data/work/train` and names the digests of adapter, base,
    tokenizer, data (training blocks), rows (accepted rows), holdout and champion.
    """
    judged, problem = _present(layout)
    judged["champion"] = NONE if champion is None else champion.adapter
    if problem:
        return refuse(RUN, problem, judged)

    def pick(*names: str) -> dict[str, str]:
        return {name: judged[name] for name in names}

    def ask_data() -> Verdict:
        folder = layout.stage("validate")
        report = ValidateReport.load(_verified(folder, "report.json"))
        rows = digest_file(_verified(folder, "rows.parquet"))
        return data.judge_data(params.data, report, rows=rows, expected=pick("rows"))

    def ask_drift() -> Verdict:
        return drift.judge_drift(params.drift, rows_now(), rows_of(champion), judged=pick("rows"))

    def ask_freshness() -> Verdict:
        now = datetime.now(UTC)
        return drift.judge_freshness(params.freshness, rows_now(), rows_of(champion), now=now, judged=pick("rows"))

    @cache
    def rows_now() -> Profile:
        return profile(_verified(layout.stage("validate"), "rows.parquet"))

    def ask_supervision() -> Verdict:
        report = PreprocessReport.load(_verified(layout.stage("preprocess"), "report.json"))
        return supervision.judge_supervision(params.supervision, report, expected=pick("tokenizer", "data", "holdout"))

    def ask_training() -> Verdict:
        from regraft.model.adapter import adapter_digest

        folder = layout.stage("train")
        verify_dir(folder)
        report = TrainReport.load(folder / "report.json")
        metrics = training.read_metrics(folder / "metrics.jsonl")
        present = adapter_digest(folder / "adapter")
        expected = pick("adapter", "base", "tokenizer", "data")
        return training.judge_training(params.training, report, metrics, adapter=present, expected=expected)

    verdicts = [
        closed(data.GATE, judged, ask_data),
        *_at(params.drift.level, closed(drift.DRIFT, judged, ask_drift)),
        *_at(params.freshness.level, closed(drift.FRESHNESS, judged, ask_freshness)),
        closed(supervision.GATE, judged, ask_supervision),
        closed(training.GATE, judged, ask_training),
        judge(params.comparison, evaluated=layout.stage("evaluate"), champion=champion, judged=judged),
    ]
    return all_gates(verdicts, judged)


def rows_of(champion: Champion | None) -> Profile | None:
    """Return what the champion's rows were like; None where there is no champion.

    Raises:
        MissingInput: it was registered without a profile.
        DamagedArtifact: the profile is unreadable.
    """
    if champion is None or champion.profile is None:
        return None
    if not champion.profile.is_file():
        raise MissingInput(
            f"{champion.label} was registered without {PROFILE}",
            fix="set gates.drift.level and gates.freshness.level to warn, until a new champion has one",
        )
    return read_profile(champion.profile)


def _at(level: str, verdict: Verdict) -> list[Verdict]:
    """Return what a gate's level leaves of its verdict, to be joined: nothing for `off`, nothing decisive for `warn`."""
    if level == "off":
        return []
    if level == "block":
        return [verdict]
    checks = [each.model_copy(update={"decisive": False}) for each in verdict.checks]
    return [verdict.model_copy(update={"checks": checks, "reasons": [], "passed": True})]


def all_gates(verdicts: list[Verdict], judged: Mapping[str, str]) -> Verdict:
    """Join verdicts into one that passes only if all do; each check is named after its gate."""
    checks = [
        check.model_copy(update={"name": f"{verdict.gate}.{check.name}"})
        for verdict in verdicts
        for check in verdict.checks
    ]
    return decide(RUN, checks, judged)


def judge(params: ComparisonGate, *, evaluated: Path, champion: Champion | None, judged: Mapping[str, str]) -> Verdict:
    """Compare challenger and champion (or base) from the folders that hold their answers; writes nothing.

    Args:
        params: margins and confidences.
        evaluated: output of the stage `evaluate`.
        champion: the adapter in use; None where there is none.
        judged: digests of what is to be judged: `adapter`, `base`, `tokenizer`, `holdout`, `champion`.
    """

    def ask() -> Verdict:
        verify_dir(evaluated)
        report = EvaluateReport.load(evaluated / "report.json")
        if stale := _stale(report, CHALLENGER, judged):
            return decide(comparison.GATE, stale, judged)
        challenger = read_answers(evaluated / f"answers-{CHALLENGER}.parquet")
        if champion is not None and champion.adapter == judged["adapter"]:
            return comparison.compare(params, [], [], known_rows=(), judged=judged)  # the same one
        if champion is None:
            base = read_answers(evaluated / f"answers-{BASE}.parquet")
            return comparison.compare(params, challenger, base, known_rows=None, judged=judged)
        known = read_answers(champion.answers)
        if champion.scored is None:
            if unlike := _unlike(report, champion):
                return decide(comparison.GATE, unlike, judged)
            shared, opponent = _shared(challenger, known)
            shared_rows = {row.row_id for row in known}
            verdict = comparison.compare(
                params, shared, opponent, known_rows=shared_rows, judged=judged, forgets=champion.forgets
            )
            return decide(comparison.GATE, [*verdict.checks, _left_out(challenger, shared)], judged)
        verify_dir(champion.scored.report.parent)
        scored = EvaluateReport.load(champion.scored.report)
        expected = {"base": judged["base"], "holdout": judged["holdout"], "adapter": champion.adapter}
        expected |= {"parameters": report.params_digest, "code": report.code_digest}
        if stale := _stale(scored, "adapter", expected):
            return decide(comparison.GATE, stale, judged)
        opponent = read_answers(champion.scored.answers)
        known_rows = {row.row_id for row in known}
        return comparison.compare(
            params, challenger, opponent, known_rows=known_rows, judged=judged, forgets=champion.forgets
        )

    return closed(comparison.GATE, judged, ask)


def _stale(report: EvaluateReport, name: str, expected: Mapping[str, str]) -> list[Check]:
    found = {
        "adapter": report.adapters.get(name, "of no adapter"),
        "base": report.base_digest,
        "tokenizer": report.tokenizer_digest,
        "holdout": report.holdout_digest,
        "parameters": report.params_digest,
        "code": report.code_digest,
    }
    wanted = {key: digest for key, digest in expected.items() if key in found}
    return same(wanted, found, "the score of the " + ("challenger" if name == CHALLENGER else "champion"))


def _unlike(report: EvaluateReport, champion: Champion) -> list[Check]:
    """Name what keeps the champion's registered answers from being compared: made or graded in another way."""
    if champion.report is None:
        return [no_evidence("the report on the champion's registered answers is missing")]
    registered = EvaluateReport.load(champion.report)
    compared = {
        "the adapter": (registered.adapters.get(CHALLENGER, "of no adapter"), champion.adapter),
        "the scoring parameters (evaluate, model.quantization)": (registered.params_digest, report.params_digest),
        "the code that scores and its libraries": (registered.code_digest, report.code_digest),
    }
    return [
        no_evidence(
            f"the champion is for another base and cannot be scored here, and of its registered answers {name} "
            f"({found[:16]}) differs from what is asked for ({wanted[:16]})"
        )
        for name, (found, wanted) in compared.items()
        if found != wanted
    ]


def _left_out(challenger: list[Answer], shared: list[Answer]) -> Check:
    count = len(challenger) - len(shared)
    detail = (
        f"The champion is for another base, so its registered answers stand in: {count} of the challenger's "
        f"{len(challenger)} rows were left out of the comparison, as the champion has not answered them."
    )
    return Check(name="left_out", passed=True, decisive=False, detail=detail, measured=count, rows=len(challenger))


def _shared(challenger: list[Answer], champion: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Keep the rows that both have answered."""
    mine, theirs = {row.row_id for row in challenger}, {row.row_id for row in champion}
    both = mine & theirs
    return [row for row in challenger if row.row_id in both], [row for row in champion if row.row_id in both]


def _present(layout: Layout) -> tuple[dict[str, str], str]:
    """Return the digests of what lies there to be judged, each taken from the stage that made it, and what is missing."""
    from regraft.model.adapter import adapter_digest

    judged: dict[str, str] = {}
    problems = []
    for stage in ("model", "validate", "preprocess", "train", "evaluate"):
        try:
            dir_digest(layout.stage(stage))
            if stage == "model":
                base = BaseReport.load(_verified(layout.stage(stage), "report.json"))
                judged |= {"base": base.digest, "tokenizer": base.tokenizer_digest}
            elif stage == "preprocess":
                prepared = PreprocessReport.load(_verified(layout.stage(stage), "report.json"))
                judged |= {
                    "data": prepared.train_digest,
                    "holdout": prepared.holdout_digest,
                    "rows": prepared.rows_digest,
                }
            elif stage == "train":
                judged["adapter"] = adapter_digest(layout.stage(stage) / "adapter")
        except (MissingInput, DamagedArtifact) as error:
            problems.append(error.message)
    return judged, "; ".join(problems)


def _verified(folder: Path, name: str) -> Path:
    """Return a file of a committed folder after comparing its bytes with the manifest."""
    if not (folder / name).is_file():
        raise MissingInput(f"{folder / name} is missing", fix=f"regraft {folder.name}")
    try:
        wanted = read_json(folder / MANIFEST)["files"][name]["sha256"]
    except (KeyError, TypeError) as error:
        raise DamagedArtifact(f"{folder / MANIFEST} does not list {name}") from error
    if digest_file(folder / name) != wanted:
        raise DamagedArtifact(f"{folder / name} is damaged: its sha256 differs from the manifest's")
    return folder / name
