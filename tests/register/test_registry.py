"""register: equal content once, whole or not at all, and nothing without a verdict about this very adapter."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clones
import pytest

from regraft.artifacts import digest_file, dir_digest
from regraft.errors import DamagedArtifact, GateRefused, MissingInput, RegraftError, ServiceUnavailable
from regraft.layout import Layout
from regraft.register import lookup, registry
from regraft.register.fetch import read_verdict
from regraft.register.params import RegisterParams
from regraft.register.service import Service
from regraft.register.version import Version

Clone = Callable[..., Layout]
POINTS = [
    "register.run",
    "register.artifacts",
    "register.uploaded",
    "register.version",
    "register.versioned",
    "register.alias",
    "register.done",
]
FILES = {
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "answers.parquet",
    "lineage.json",
    "manifest.json",
    "profile.json",
    "reports/evaluate.json",
    "reports/model.json",
    "reports/preprocess.json",
    "reports/train.json",
    "reports/validate.json",
    "verdict.json",
}


def register(layout: Layout, params: RegisterParams = clones.PARAMS) -> Version:
    return registry.register(params, layout=layout, resolved=clones.RESOLVED)


def store(layout: Layout) -> Any:
    return Service.of(clones.PARAMS, layout).client


def runs(layout: Layout) -> list[Any]:
    client = store(layout)
    experiment = client.get_experiment_by_name("regraft")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_version_holds_the_adapter_and_all_evidence_and_is_the_challenger(clone: Clone) -> None:
    layout = clone()
    made = register(layout)
    assert (made.number, made.new, made.aliases, made.complete) == (1, True, ("challenger",), True)
    assert files(Path(made.source)) == FILES
    assert dir_digest(Path(made.source)) == made.manifest_digest
    assert made.adapter_digest == clones.report(layout, "train")["adapter_digest"]
    assert made.verdict == "passed"
    assert made.verdict_digest == digest_file(layout.verdict / "verdict.json")


def test_the_run_of_a_version_carries_parameters_final_metrics_curve_and_reports(clone: Clone) -> None:
    layout = clone()
    made = register(layout)
    (run,) = runs(layout)
    assert run.info.run_id == made.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.rank": "4", "model.base": "standin"}
    assert run.data.metrics["evaluate/challenger/exact_match"] == 0.5
    assert run.data.metrics["train/loss_last"] == 0.6
    assert [m.step for m in store(layout).get_metric_history(made.run_id, "loss")] == [1, 2, 3, 4, 5]
    assert run.data.tags["regraft.verdict"] == "passed"
    evidence = {each.path for each in store(layout).list_artifacts(made.run_id, "evidence")}
    assert "evidence/verdict.json" in evidence
    assert "evidence/train.json" in evidence


def test_equal_content_registered_twice_is_one_version_and_says_so(clone: Clone) -> None:
    first = register(clone())
    second = register(clone())
    assert (second.number, second.new, second.identity) == (first.number, False, first.identity)
    assert len(runs(clone())) == 1


def test_another_adapter_is_another_version_and_takes_over_the_alias(clone: Clone) -> None:
    register(clone())
    made = register(clone(adapter="two"))
    assert (made.number, made.new) == (2, True)
    listed = lookup.versions(clones.PARAMS, clone())
    assert [(each.number, each.aliases) for each in listed] == [(1, ()), (2, ("challenger",))]


@pytest.mark.parametrize("point", POINTS)
def test_after_an_error_at_any_point_a_second_try_gives_exactly_one_whole_version(
    clone: Clone, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = clone()
    monkeypatch.setenv("REGRAFT_FAILPOINT", f"{point}=EIO")
    with pytest.raises(OSError, match="Input/output error"):
        register(layout)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    register(layout)
    assert_one_whole(layout)


def assert_one_whole(layout: Layout) -> None:
    (made,) = lookup.versions(clones.PARAMS, layout)
    assert (made.number, made.complete, made.aliases) == (1, True, ("challenger",))
    assert files(Path(made.source)) == FILES
    assert dir_digest(Path(made.source)) == made.manifest_digest
    (run,) = runs(layout)
    assert (run.info.run_id, run.info.status) == (made.run_id, "FINISHED")
    assert [m.step for m in store(layout).get_metric_history(made.run_id, "loss")] == [1, 2, 3, 4, 5]


def killed_at(layout: Layout, point: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(clones.__file__).parent)!r})\n"
        "from pathlib import Path\nimport clones\n"
        "from regraft.layout import Layout\nfrom regraft.register.registry import register\n"
        f"register(clones.PARAMS, layout=Layout(Path({str(layout.root)!r})), resolved=clones.RESOLVED)\n"
    )
    env = {**os.environ, "REGRAFT_TESTING": "1", "REGRAFT_FAILPOINT": point}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_between_upload_and_version_it_is_registered_once_by_the_next(clone: Clone) -> None:
    layout = clone()
    killed_at(layout, "register.version")
    assert lookup.versions(clones.PARAMS, layout) == []
    register(layout)
    assert_one_whole(layout)


@pytest.mark.faults
@pytest.mark.parametrize("point", [*POINTS, "commit_dir.manifest", "snapshot.ref"])
def test_killed_at_any_point_it_is_registered_once_by_the_next(clone: Clone, point: str) -> None:
    layout = clone()
    if point == "snapshot.ref":
        subprocess.run(["git", "init", "-q"], cwd=layout.root, check=True)
    killed_at(layout, point)
    register(layout)
    assert_one_whole(layout)


def test_an_answer_lost_after_the_server_had_created_the_version_makes_no_second_one(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, lost = clone(), []
    ask = Service.ask

    def lossy(self: Service, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = ask(self, method, *args, **kwargs)
        if method == "create_model_version":
            lost.append(method)
            raise self.unavailable("the answer was lost")
        return answer

    monkeypatch.setattr(Service, "ask", lossy)
    register(layout)
    assert lost == ["create_model_version"]
    monkeypatch.undo()
    assert_one_whole(layout)


def test_a_collision_of_two_writers_inside_mlflow_is_tried_again(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, collided = clone(), []
    client = type(store(layout))
    set_alias = client.set_registered_model_alias

    def colliding(self: Any, *args: Any) -> None:
        from mlflow.exceptions import MlflowException

        if not collided:
            collided.append(True)
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed", error_code=4)
        set_alias(self, *args)

    monkeypatch.setattr(client, "set_registered_model_alias", colliding)
    assert register(layout).aliases == ("challenger",)
    assert collided == [True]


def test_two_machines_that_register_the_same_at_once_end_with_one_version(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, other = clone(), []
    ask = Service.ask

    def overtaken(self: Service, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "create_model_version" and not other:
            other.append(True)
            ask(self, method, *args, **kwargs)  # the other machine's, a moment earlier
        return ask(self, method, *args, **kwargs)

    monkeypatch.setattr(Service, "ask", overtaken)
    made = register(layout)
    assert (made.number, made.new) == (1, False)
    assert [each.number for each in lookup.versions(clones.PARAMS, layout)] == [1]


def test_a_refused_adapter_becomes_no_version_but_its_run_says_why(clone: Clone) -> None:
    layout = clone(passed=False)
    with pytest.raises(GateRefused, match=r"against this adapter: Better: no\.\n  \(kept as MLflow run"):
        register(layout)
    assert lookup.versions(clones.PARAMS, layout) == []
    (run,) = runs(layout)
    assert run.data.tags["regraft.verdict"] == "refused"
    assert run.data.tags["regraft.adapter_digest"] == clones.report(layout, "train")["adapter_digest"]


def test_a_second_refusal_of_the_same_adapter_makes_no_second_run(clone: Clone) -> None:
    layout = clone(passed=False)
    for _ in range(2):
        with pytest.raises(GateRefused):
            register(layout)
    assert len(runs(layout)) == 1


def test_without_a_verdict_nothing_is_registered_and_mlflow_is_not_asked(clone: Clone) -> None:
    layout = clone()
    (layout.verdict / "manifest.json").unlink()
    with pytest.raises(GateRefused, match="no readable verdict"):
        register(layout, RegisterParams(tracking_uri="http://127.0.0.1:9"))


@pytest.mark.parametrize("what", ["verdict", "adapter", "report"])
def test_an_altered_byte_is_found_before_anything_is_registered(clone: Clone, what: str) -> None:
    layout = clone()
    path = {
        "verdict": layout.verdict / "verdict.json",
        "adapter": layout.stage("train") / "adapter/adapter_model.safetensors",
        "report": layout.stage("preprocess") / "report.json",
    }[what]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(GateRefused if what == "verdict" else DamagedArtifact):
        register(layout)
    assert lookup.versions(clones.PARAMS, layout) == []


def test_a_verdict_about_another_adapter_is_none(clone: Clone) -> None:
    layout = clone(adapter="two")
    clones.stage(layout, "train", clones.report(layout, "train"), {"adapter/adapter_config.json": b"{}",
                 "adapter/adapter_model.safetensors": b"three"})  # fmt: skip
    with pytest.raises(GateRefused) as refused:
        register(layout)
    for what in ("digest in the training report", "adapter that was evaluated", "adapter that the verdict is about"):
        assert what in refused.value.message


def test_a_verdict_of_one_gate_does_not_stand_for_all(clone: Clone) -> None:
    layout = clone()
    clones.judge(layout, "none", gate="data")
    with pytest.raises(GateRefused, match="the gate of the verdict is 'data', expected 'run'"):
        register(layout)


def test_a_stage_that_did_not_run_is_named(clone: Clone) -> None:
    layout = clone()
    (layout.stage("evaluate") / "manifest.json").unlink()
    with pytest.raises(MissingInput, match="evaluate"):
        register(layout)


def test_a_new_verdict_on_known_content_is_attached_to_its_version(clone: Clone) -> None:
    layout = clone()
    first = register(layout)
    digest = clones.judge(layout, "f" * 64)
    second = register(layout)
    assert (second.number, second.new, second.verdict_digest) == (1, False, digest)
    assert read_verdict(second).judged["champion"] == "f" * 64
    (found,) = lookup.versions(clones.PARAMS, layout)
    assert found.tags == {**first.tags, "regraft.verdict_digest": digest, "regraft.judged_against": "f" * 64}


def test_a_later_refusal_of_known_content_is_attached_too(clone: Clone) -> None:
    layout = clone()
    register(layout)
    clones.judge(layout, "none", passed=False)
    with pytest.raises(GateRefused):
        register(layout)
    (found,) = lookup.versions(clones.PARAMS, layout)
    assert (found.verdict, read_verdict(found).passed) == ("refused", False)


@pytest.mark.parametrize("passage", [1, 2, 3])
def test_a_verdict_that_was_attached_by_half_lets_nothing_pass_and_is_completed_by_the_next(
    clone: Clone, passage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = clone()
    register(layout)
    digest = clones.judge(layout, "f" * 64)
    monkeypatch.setenv("REGRAFT_FAILPOINT", f"register.verdict@{passage}=EIO")
    with pytest.raises(OSError, match="Input/output error"):
        register(layout)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    register(layout)
    (found,) = lookup.versions(clones.PARAMS, layout)
    assert (found.verdict_digest, found.tags["regraft.judged_against"]) == (digest, "f" * 64)


def test_with_nothing_to_do_a_sqlite_store_is_not_asked_through_mlflow(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = clone()
    register(layout)
    monkeypatch.setattr(Service, "ask", lambda *_, **__: pytest.fail("asked"))
    assert register(layout).new is False


def test_a_server_that_hangs_is_given_up_in_time_with_its_address_and_the_next_command(
    clone: Clone, hanging: str
) -> None:
    layout = clone()
    params = RegisterParams(tracking_uri=hanging, timeout=1, patience=1)
    Service.of(params, layout).client  # noqa: B018 - the import's time is not the server's
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable) as given_up:
        register(layout, params)
    assert time.monotonic() - started < 5
    assert hanging in given_up.value.message
    assert "`regraft register`" in str(given_up.value.fix)


def test_a_server_that_refuses_is_tried_for_as_long_as_patience_says(clone: Clone) -> None:
    layout = clone()
    params = RegisterParams(tracking_uri="http://127.0.0.1:9", timeout=1, patience=2)
    Service.of(params, layout).client  # noqa: B018
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"http://127\.0\.0\.1:9 is not available"):
        register(layout, params)
    assert 1.4 < time.monotonic() - started < 5


def test_time_spent_between_two_answers_is_not_held_against_the_service(clone: Clone) -> None:
    service = Service.of(clones.PARAMS, clone())
    service.patience = 0.2
    for answered in (
        lambda: service.ask("search_registered_models"),
        lambda: service.model("missing"),  # a refusal is an answer, too
        lambda: service.transfer(str, "uploaded"),
    ):
        answered()
        time.sleep(0.3)  # hashing, say
        assert list(service.ask("search_registered_models")) == []


def test_the_largest_time_limits_together_stay_under_a_minute() -> None:
    limits = {name: field.metadata for name, field in RegisterParams.model_fields.items()}
    longest = {name: next(m.le for m in limits[name] if hasattr(m, "le")) for name in ("timeout", "patience")}
    assert longest["timeout"] + longest["patience"] < 60


def test_a_refusal_stays_a_refusal_when_mlflow_is_away(clone: Clone) -> None:
    layout = clone(passed=False)
    with pytest.raises(GateRefused, match="not kept in MLflow"):
        register(layout, RegisterParams(tracking_uri="http://127.0.0.1:9", timeout=1, patience=1))


def test_an_artefact_store_that_cannot_be_written_is_named_and_nothing_is_registered(clone: Clone) -> None:
    layout = clone()
    (layout.root / "mlartifacts").write_text("a file where the folder should be")
    with pytest.raises(RegraftError, match="mlartifacts cannot be used"):
        register(layout)
    assert lookup.versions(clones.PARAMS, layout) == []


def test_nobodys_name_and_no_host_gets_into_the_store(clone: Clone) -> None:
    layout = clone()
    register(layout)
    with sqlite3.connect(layout.root / "mlflow.db") as database:
        tags = dict(database.execute("SELECT key, value FROM tags").fetchall())
        users = {row[0] for row in database.execute("SELECT user_id FROM runs")}
    database.close()
    assert not any(key in tags for key in ("mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"))
    assert users <= {"unknown", "", None}


@pytest.mark.faults
def test_four_cold_starts_at_once_all_register_and_make_one_version(clone: Clone) -> None:
    layout = clone()
    (layout.root / "mlflow.db").unlink()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(clones.__file__).parent)!r})\n"
        "from pathlib import Path\nimport clones\n"
        "from regraft.layout import Layout\nfrom regraft.register.registry import register\n"
        f"print(register(clones.PARAMS, layout=Layout(Path({str(layout.root)!r})), resolved=clones.RESOLVED).new)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [each.communicate(timeout=300) for each in started]
    assert sorted(out for out, _ in answers) == ["False\n", "False\n", "False\n", "True\n"], answers
    assert {err for _, err in answers} == {""}
    assert_one_whole(layout)
