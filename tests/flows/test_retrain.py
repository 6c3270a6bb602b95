"""The order of the steps and the final states of the flow `retrain`, on a Prefect server; the steps are replaced."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.retrain import retrain
from regraft import decision, settings, steps
from regraft import retrain as library
from regraft.decision import Decision
from regraft.errors import Busy, GateRefused, RegraftError, StageFailed
from regraft.gates.verdict import Check, Verdict, decide
from regraft.layout import Layout
from regraft.pipeline import StageResult
from regraft.register.version import Version
from regraft.retrain import Outcome, Plan
from regraft.retrain_params import RetrainParams, Timeouts
from regraft.steps import Exported

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
ALL = ["model", "validate", "preprocess", "train", "evaluate", "verdict", "register", "promote", "export"]


class Parameters:
    """The sections that the flow reads."""

    timeouts = Timeouts()

    def __init__(self, *, auto: bool = True) -> None:
        self.retrain = RetrainParams(retries=2, retry_delay=0, timeouts=self.timeouts)
        self.promote = type("Promote", (), {"auto": auto})()


class Steps:
    """Stands in for `regraft.steps` and for what the flow asks of `regraft.retrain`; records the order."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        todo: list[str],
        *,
        passes: bool = True,
        auto: bool = True,
        slow: str | None = None,
    ) -> None:
        self.done: list[str] = []
        self.asked: list[str] = []
        self.slow = slow
        self.failing: dict[str, list[RegraftError]] = {}
        self.passes = passes
        self.champion: Version | None = None
        self.version = Version("regraft", 7, "", "", "", 0)
        self.decided = Decision("train")
        self.heeded: list[Decision] = []
        monkeypatch.setattr(decision, "decide", lambda layout, parameters: self._ask("decide", self.decided))
        monkeypatch.setattr(
            decision, "heed", lambda layout, parameters, found: (self.heeded.append(found), parameters)[1]
        )
        plan = Plan({name: ["because"] for name in todo}, {}, Outcome(state="nothing to do", lines=["Nothing to do."]))
        monkeypatch.setattr(settings, "load", lambda layout: Parameters(auto=auto))
        for name, replacement in {
            "plan": lambda layout, parameters, fingerprint=None: self._ask("plan", plan),
            "fingerprint_now": lambda layout, parameters: self._ask("fingerprint", "f"),
            "remember": lambda layout, parameters, plan, fingerprint: plan.standing,
            "is_champion": lambda layout, parameters: self.champion,
            "rolled_back": lambda layout, parameters: None,
            "conclude": self._conclude,
        }.items():
            monkeypatch.setattr(library, name, replacement)
        monkeypatch.setattr(
            steps, "bring_up", lambda layout, parameters, stage: self._do(stage, StageResult(stage, True, 1))
        )
        monkeypatch.setattr(steps, "judge_and_save", lambda layout, parameters: self._do("verdict", self._verdict()))
        monkeypatch.setattr(
            steps, "register_challenger", lambda *_: self._do("register", self.version if passes else None)
        )
        monkeypatch.setattr(steps, "promote_if_passed", self._promote)
        monkeypatch.setattr(steps, "export_version", lambda *_: self._do("export", Exported(7, Path("/x"), True)))

    def _do(self, step: str, result: Any) -> Any:
        self.done.append(step)
        if step == self.slow:
            time.sleep(20)
        if self.failing.get(step):
            raise self.failing[step].pop(0)
        return result

    def _ask(self, what: str, answer: Any) -> Any:
        self.asked.append(what)
        return answer

    def _verdict(self) -> Verdict:
        return decide("run", [Check(name="c", passed=self.passes, detail="It is so.")], {"adapter": "a"})

    def _promote(self, *_: Any) -> Any:
        self.champion = self.version
        return self._do("promote", type("Promotion", (), {"version": self.version})())

    def _conclude(
        self, layout: Layout, parameters: Any, *, ran: list[str], verdict: Verdict | None = None, **more: Any
    ) -> Outcome:
        champion = self.champion is not None
        if more["decision"] is not None and more["decision"].action == "skip":
            return Outcome(state="skipped", lines=["Left."], ran=ran)
        state: Any = "promoted" if champion else "rejected" if verdict and not verdict.passed else "waiting"
        return Outcome(state=state, lines=["In words."], ran=ran)


@pytest.fixture
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Steps, Any]]:
    monkeypatch.chdir(tmp_path)

    def run(todo: list[str], *, failing: dict[str, list[RegraftError]] | None = None, **more: Any) -> tuple[Steps, Any]:
        world = Steps(monkeypatch, todo, **more)
        world.failing = failing or {}
        return world, retrain(return_state=True)

    return run


def test_a_challenger_that_wins_is_registered_promoted_and_exported_in_order(flow: Any) -> None:
    world, state = flow(ALL)
    assert world.done == ALL
    assert (state.type.value, state.name, state.message) == ("COMPLETED", "Promoted", "In words.")


def test_a_refused_challenger_is_an_answer_and_not_a_crash_and_nothing_is_promoted(flow: Any) -> None:
    world, state = flow(ALL, passes=False)
    assert world.done == ALL[:-2]
    assert (state.type.value, state.name) == ("COMPLETED", "Rejected")


def test_a_challenger_waits_where_promotion_is_a_persons(flow: Any) -> None:
    world, state = flow(ALL, auto=False)
    assert world.done == ALL[:-2]
    assert state.name == "Waiting"


def test_only_the_stages_that_changed_are_run(flow: Any) -> None:
    world, _ = flow(["train", "evaluate", "verdict", "register", "promote", "export"])
    assert world.done == ["train", "evaluate", "verdict", "register", "promote", "export"]


def test_a_change_that_is_not_worth_it_ends_before_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = Steps(monkeypatch, ALL)
    world.decided = Decision("skip", ["Not trained."], 1)
    state: Any = retrain(return_state=True)
    assert world.done == ["model", "validate"]
    assert world.heeded == []
    assert (state.type.value, state.name, state.message) == ("COMPLETED", "Skipped", "Left.")


def test_what_training_begins_with_is_settled_between_validation_and_preparation(flow: Any) -> None:
    world, _ = flow(ALL)
    assert world.heeded == [world.decided]
    world, _ = flow(["verdict", "register", "promote", "export"])
    assert world.heeded == []  # no stage changed: nothing is compared


def test_with_nothing_to_do_no_step_is_run(flow: Any) -> None:
    world, state = flow([])
    assert (world.done, state.name) == ([], "NothingToDo")


def test_a_busy_stage_is_tried_again_and_a_refusal_is_not(flow: Any) -> None:
    world, state = flow(ALL, failing={"train": [Busy("b"), Busy("b")]})
    assert world.done[3:7] == ["train", "train", "train", "evaluate"]
    assert state.name == "Promoted"
    world, state = flow(ALL, failing={"train": [GateRefused("The loss was not finite.")]})
    assert world.done == ["model", "validate", "preprocess", "train"]
    assert (state.type.value, state.message) == ("FAILED", "The loss was not finite.")


def test_a_failure_is_the_stages_own_error_when_the_flow_is_called(flow: Any) -> None:
    _, state = flow(ALL, failing={"validate": [StageFailed("No column `text`.", fix="edit", stage="validate", code=2)]})
    with pytest.raises(StageFailed, match=r"No column `text`\.") as caught:
        state.result()
    assert caught.value.exit_code == 2


def test_a_step_that_takes_too_long_fails_with_the_name_of_its_timeout(
    flow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = Timeouts(train=1)
    monkeypatch.setattr(Parameters, "timeouts", timeouts)
    _, state = flow(ALL, slow="train")
    with pytest.raises(RegraftError) as caught:
        state.result()
    assert type(caught.value) is RegraftError
    assert caught.value.message == "`train` took longer than 1 s and was stopped"
    assert caught.value.fix == "raise retrain.timeouts.train in params.yaml, then run the same command again"


def test_the_fingerprint_is_taken_before_the_plan(flow: Any) -> None:
    world, _ = flow([])
    assert world.asked == ["fingerprint", "plan"]


def test_the_verdict_is_a_table_and_the_outcome_a_page_among_the_artifacts(flow: Any) -> None:
    flow(ALL)
    with get_client(sync_client=True) as client:
        found = {each["key"]: each["type"] for each in client.request("POST", "/artifacts/filter", json={}).json()}
    assert found == {**found, "verdict": "table", "verdict-in-words": "markdown", "outcome": "markdown"}
