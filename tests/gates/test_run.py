import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clones
import pytest

from regraft.artifacts import commit_dir, digest_bytes, write_json
from regraft.evaluate.answers import Answer, read_answers, summarise, write_answers
from regraft.evaluate.params import EvaluateParams
from regraft.evaluate.report import EvaluateReport
from regraft.evaluate.store import Stored
from regraft.gates.params import GatesParams
from regraft.gates.profile import profile
from regraft.gates.run import Champion, champion_evidence, judge_run
from regraft.gates.verdict import Verdict, explain
from regraft.layout import Layout
from regraft.model.adapter import adapter_digest
from regraft.model.params import Quantization

Make = Callable[..., list[Answer]]
ROWS = clones.accepted(200)
SLICES = {"action": "track_order"}


@dataclass
class Run:
    """A clone whose stages have run, and a champion that has been scored there."""

    layout: Layout
    champion: Champion
    digests: dict[str, str]

    def judge(self, champion: Champion | None = None) -> Verdict:
        return judge_run(self.layout, GatesParams(), champion)

    def rewrite(self, stage: str, change: Callable[[Path], None]) -> None:
        """Change a stage's output and commit it again, as a stage would."""
        kept = self.layout.root / "kept"
        shutil.copytree(self.layout.stage(stage), kept)
        with commit_dir(self.layout.stage(stage)) as folder:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            change(folder)
        shutil.rmtree(kept)


def _write(folder: Path, files: dict[str, bytes | Callable[[Path], object]]) -> None:
    with commit_dir(folder) as made:
        for name, content in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(made / name)
            else:
                (made / name).write_bytes(content)


def _evaluated(digests: dict[str, str], adapters: dict[str, str], tables: dict[str, list[Answer]]) -> EvaluateReport:
    return EvaluateReport(
        base_digest=digests["base"],
        tokenizer_digest=digests["tokenizer"],
        holdout_digest=digests["holdout"],
        params_digest="p" * 64,
        code_digest="k" * 64,
        rows=len(tables[next(iter(adapters))]),
        held_out=len(tables[next(iter(adapters))]),
        answers_too_long=0,
        adapters=adapters,
        scores={name: summarise(rows, ["action"]) for name, rows in tables.items()},
    )


@pytest.fixture
def run(reports: Any, table: Make, tmp_path: Path) -> Run:
    layout = Layout(tmp_path)
    weights = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"challenger"}
    _write(layout.stage("train"), weights)
    digests = {name: name[0] * 64 for name in ("base", "tokenizer", "data", "holdout")}
    digests |= {"rows": digest_bytes(ROWS), "adapter": adapter_digest(layout.stage("train") / "adapter")}
    trained = reports.train(digests)
    lines = "".join(f'{{"step": {step}, "loss": 1.0, "grad_norm": 1.0}}\n' for step in range(1, 4)).encode()
    _write(layout.stage("train"), {**weights, "metrics.jsonl": lines, "report.json": trained.save})
    _write(layout.stage("model"), {"report.json": reports.model().save})
    _write(layout.stage("validate"), {"rows.parquet": ROWS, "report.json": reports.validate().save})
    _write(layout.stage("preprocess"), {"report.json": reports.preprocess(digests).save})

    old = table([True] * 285 + [False] * 15, slices=SLICES)
    champion = old + table([False] * 60, first=300, slices={"action": "book_repair"})
    challenger = table([True] * 290 + [False] * 10, slices=SLICES)
    challenger += table([True] * 57 + [False] * 3, first=300, slices={"action": "book_repair"})
    tables = {"base": table([False] * 360, slices=SLICES), "challenger": challenger}
    report = _evaluated(digests, {"challenger": digests["adapter"]}, tables)
    _write(
        layout.stage("evaluate"),
        {
            "report.json": report.save,
            **{
                f"answers-{name}.parquet": lambda path, rows=rows: write_answers(path, rows)
                for name, rows in tables.items()
            },
        },
    )
    scored = _evaluated(digests, {"adapter": "c" * 64}, {"adapter": champion})
    folder = layout.scores / ("0" * 16)
    _write(folder, {"report.json": scored.save, "answers-adapter.parquet": lambda path: write_answers(path, champion)})
    registered = tmp_path / "answers.parquet"
    write_answers(registered, old)
    stored = Stored(folder / "report.json", folder / "answers-adapter.parquet")
    return Run(layout, Champion(adapter="c" * 64, answers=registered, scored=stored), digests)


def _registered(run: Run, **changes: Any) -> Path:
    """Write the report that was registered with a champion of another base."""
    present = EvaluateReport.load(run.layout.stage("evaluate") / "report.json")
    other = {"base_digest": "o" * 64, "adapters": {"challenger": "c" * 64}, **changes}
    path = run.champion.answers.parent / "reports/evaluate.json"
    path.parent.mkdir(exist_ok=True)
    present.model_copy(update=other).save(path)
    return path


def _evidence(verdict: Verdict) -> list[str]:
    assert not verdict.passed
    return [each.name for each in verdict.checks if each.name.endswith(".evidence") or each.name == "evidence"]


def test_a_good_run_passes_every_gate_and_the_verdict_names_what_it_judged(run: Run) -> None:
    verdict = run.judge(run.champion)
    assert verdict.reasons == []
    assert verdict.passed
    assert verdict.gate == "run"
    assert verdict.judged == {**run.digests, "champion": "c" * 64}
    assert {each.name.split(".")[0] for each in verdict.checks} == {
        *("data", "drift", "freshness", "supervision", "training", "comparison")
    }
    assert "On the 60 new rows (action=book_repair) the challenger answers 95 % exactly, the champion 0 %" in "\n".join(
        explain(verdict)
    )


def test_a_first_run_is_compared_with_the_base_and_says_that_there_was_no_champion(run: Run) -> None:
    verdict = run.judge()
    assert verdict.passed
    assert verdict.judged["champion"] == "none"


def test_judging_writes_nothing(run: Run) -> None:
    before = sorted(run.layout.root.rglob("*"))
    run.judge(run.champion)
    assert sorted(run.layout.root.rglob("*")) == before


@pytest.mark.parametrize("stage", ["model", "validate", "preprocess", "train", "evaluate"])
def test_without_a_stages_output_the_answer_is_no(run: Run, stage: str) -> None:
    shutil.rmtree(run.layout.stage(stage))
    assert _evidence(run.judge()) == ["evidence"]


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("model", "report.json"),
        ("validate", "report.json"),
        ("validate", "rows.parquet"),
        ("preprocess", "report.json"),
        ("train", "report.json"),
        ("train", "metrics.jsonl"),
        ("train", "adapter/adapter_model.safetensors"),
        ("evaluate", "report.json"),
        ("evaluate", "answers-base.parquet"),
        ("evaluate", "answers-challenger.parquet"),
    ],
)
def test_evidence_altered_after_it_was_committed_is_a_no_although_it_reads_well(
    run: Run, stage: str, name: str
) -> None:
    path = run.layout.stage(stage) / name
    if path.suffix == ".parquet" and stage == "evaluate":
        write_answers(path, [replace(row, generated="altered") for row in read_answers(path)])
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    assert _evidence(run.judge())


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("validate", "report.json"),
        ("validate", "rows.parquet"),
        ("preprocess", "report.json"),
        ("train", "report.json"),
        ("train", "metrics.jsonl"),
        ("evaluate", "report.json"),
        ("evaluate", "answers-base.parquet"),
        ("evaluate", "answers-challenger.parquet"),
    ],
)
def test_evidence_that_is_unreadable_although_it_was_committed_so_is_a_no(run: Run, stage: str, name: str) -> None:
    run.rewrite(stage, lambda folder: (folder / name).write_text("{") and None)
    assert _evidence(run.judge())


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("train", "base"),
        ("train", "data"),
        ("train", "adapter"),
        ("preprocess", "tokenizer"),
        ("preprocess", "holdout"),
        ("preprocess", "data"),
        ("preprocess", "rows"),
    ],
)
def test_a_report_made_from_something_else_is_a_no(run: Run, reports: Any, stage: str, name: str) -> None:
    other = getattr(reports, stage)({**run.digests, name: "x" * 64})
    run.rewrite(stage, lambda folder: other.save(folder / "report.json"))
    assert _evidence(run.judge())


@pytest.mark.parametrize("name", ["base_digest", "holdout_digest", "tokenizer_digest", "adapters"])
def test_an_evaluation_of_something_else_is_a_no(run: Run, name: str) -> None:
    path = run.layout.stage("evaluate") / "report.json"
    other = EvaluateReport.load(path).model_copy(
        update={name: {"challenger": "x" * 64} if name == "adapters" else "x" * 64}
    )
    run.rewrite("evaluate", lambda folder: other.save(folder / "report.json"))
    assert _evidence(run.judge()) == ["comparison.evidence"]


def test_a_champion_whose_score_is_missing_damaged_or_about_something_else_is_not_beaten(run: Run) -> None:
    assert run.champion.scored is not None
    folder = run.champion.scored.report.parent
    report = EvaluateReport.load(run.champion.scored.report)
    table = run.champion.scored.answers.read_bytes()
    for change in (
        {"holdout_digest": "x" * 64},
        {"base_digest": "x" * 64},
        {"params_digest": "x" * 64},
        {"code_digest": "x" * 64},
        {"adapters": {"adapter": "x" * 64}},
    ):
        other = report.model_copy(update=change)
        _write(folder, {"report.json": other.save, "answers-adapter.parquet": table})
        assert _evidence(run.judge(run.champion)) == ["comparison.evidence"]
    _write(folder, {"report.json": report.save, "answers-adapter.parquet": table})
    assert run.judge(run.champion).passed
    write_answers(
        run.champion.scored.answers, [replace(row, generated="") for row in read_answers(run.champion.scored.answers)]
    )
    assert _evidence(run.judge(run.champion)) == ["comparison.evidence"]
    shutil.rmtree(folder)
    assert _evidence(run.judge(run.champion)) == ["comparison.evidence"]


def test_without_the_answers_that_were_registered_with_the_champion_the_answer_is_no(run: Run) -> None:
    run.champion.answers.unlink()
    assert _evidence(run.judge(run.champion)) == ["comparison.evidence"]


def test_the_champions_own_adapter_does_not_replace_it(run: Run) -> None:
    same = Champion(run.digests["adapter"], run.champion.answers, run.champion.scored)
    verdict = run.judge(same)
    assert not verdict.passed
    assert "The challenger is the same adapter." in verdict.reasons


def test_a_champion_that_is_to_forget_rows_is_replaced_by_one_that_is_not_worse(run: Run, table: Make) -> None:
    path = run.champion.answers
    equal = [each for each in read_answers(run.layout.stage("evaluate") / "answers-challenger.parquet") if each.exact]
    write_answers(path, equal)
    report = _registered(run)
    for forgets in (False, True):
        verdict = run.judge(Champion("c" * 64, path, None, report, forgets=forgets))
        assert verdict.passed is forgets
    assert "comparison.forgets" in {each.name for each in verdict.checks}


def test_a_champion_of_another_base_is_compared_on_the_rows_that_both_have_answered(run: Run, table: Make) -> None:
    write_answers(run.champion.answers, table([True] * 200 + [False] * 100 + [True] * 50, first=0, slices=SLICES)[:300])
    verdict = run.judge(Champion("c" * 64, run.champion.answers, None, _registered(run)))
    assert verdict.passed
    found = {each.name: each for each in verdict.checks}
    assert found["comparison.better_overall"].rows == 300
    assert "60 of the challenger's 360 rows were left out" in found["comparison.left_out"].detail


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"params_digest": "x" * 64}, "the scoring parameters"),
        ({"code_digest": "x" * 64}, "the code that scores"),
        ({"adapters": {"challenger": "x" * 64}}, "the adapter"),
    ],
)
def test_answers_of_a_champion_of_another_base_count_only_if_made_and_graded_in_the_same_way(
    run: Run, table: Make, change: dict[str, Any], what: str
) -> None:
    write_answers(run.champion.answers, table([True] * 200 + [False] * 100, slices=SLICES))
    verdict = run.judge(Champion("c" * 64, run.champion.answers, None, _registered(run, **change)))
    assert _evidence(verdict) == ["comparison.evidence"]
    assert f"of its registered answers {what}" in verdict.reasons[0]


def test_answers_of_a_champion_of_another_base_without_their_report_are_no_evidence(run: Run) -> None:
    gone = run.layout.root / "gone.json"
    for report in (None, gone):
        assert _evidence(run.judge(Champion("c" * 64, run.champion.answers, None, report))) == ["comparison.evidence"]


def test_the_champions_evidence_is_taken_from_the_store_only_for_the_present_base(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def scores(layout: Layout, params: EvaluateParams, quantization: Quantization, adapter: Path) -> Stored:
        calls.append(adapter)
        return Stored(adapter, adapter)

    monkeypatch.setattr("regraft.gates.run.scores", scores)
    adapter = run.layout.stage("train") / "adapter"
    given: dict[str, Any] = {"adapter": adapter, "answers": run.champion.answers}
    here = champion_evidence(run.layout, EvaluateParams(), Quantization(), base=run.digests["base"], **given)
    elsewhere = champion_evidence(run.layout, EvaluateParams(), Quantization(), base="x" * 64, **given)
    assert calls == [adapter]
    assert (here.scored is None, elsewhere.scored is None) == (False, True)
    assert here.adapter == run.digests["adapter"]
    assert elsewhere.report == run.champion.answers.parent / "reports/evaluate.json"


@pytest.mark.parametrize("level", ["off", "warn", "block"])
def test_drift_refuses_warns_or_is_not_asked_as_its_level_says(level: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "old.parquet").write_bytes(clones.accepted(200, action="repair", month=8))
    write_json(tmp_path / "profile.json", profile(tmp_path / "old.parquet").to_dict())
    champion = replace(run.champion, profile=tmp_path / "profile.json")
    params = GatesParams.model_validate({"drift": {"level": level}, "freshness": {"level": level}})
    verdict = judge_run(run.layout, params, champion)
    drifted = [each for each in verdict.checks if each.name == "drift.slice action"]
    assert [each.passed for each in drifted] == ([] if level == "off" else [False])
    assert verdict.passed is (level != "block")
    told = [line for line in explain(verdict) if line.startswith("note: drift: slice action: changed")]
    assert len(told) == (level == "warn")


@pytest.mark.parametrize(("level", "passed"), [("warn", True), ("block", False)])
def test_a_champion_that_was_registered_without_a_profile_is_no_evidence_against_drift(
    level: str, passed: bool, run: Run, tmp_path: Path
) -> None:
    champion = replace(run.champion, profile=tmp_path / "gone.json")
    verdict = judge_run(run.layout, GatesParams.model_validate({"drift": {"level": level}}), champion)
    assert verdict.passed is passed
    found = [each for each in verdict.checks if each.name == "drift.evidence"]
    assert ["registered without profile.json" in each.detail for each in found] == [True]
