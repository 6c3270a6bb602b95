"""What would run and why, how a run ended, and one at a time; DVC and the registry are replaced."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regraft import retrain
from regraft.artifacts import commit_dir, write_json
from regraft.decision import Decision
from regraft.errors import Busy
from regraft.export.export import export_key
from regraft.gates.verdict import Check, Verdict, decide
from regraft.layout import Layout
from regraft.register.version import Entry, Version, identity
from regraft.retrain import Outcome
from regraft.retrain_params import RetrainParams
from regraft.settings import Settings

ROOT = Path(__file__).parent.parent
PARTS = {"adapter": "a" * 64, "base": "b" * 64, "tokenizer": "c" * 64, "data": "d" * 64, "params": "e" * 64}
PRESENT = identity(**PARTS)


def version(number: int, which: str = PRESENT, aliases: tuple[str, ...] = ()) -> Version:
    tags = {"regraft.identity": which, "regraft.adapter_digest": f"{number}" * 64}
    return Version("regraft", number, "", "", "", 0, tags, aliases)


def entry(number: int, action: Any, previous: int | None, to: int) -> Entry:
    return Entry(number, action, previous, to, "", "", "", None, "")


class World:
    """A clone whose stages have run, and a registry."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layout = Layout(root)
        self.changed: dict[str, list[str]] = {}
        self.versions: list[Version] = []
        self.ledger: list[Entry] = []
        sections: dict[str, Any] = {
            name: {} for name in ("data", "model", "validate", "preprocess", "evaluate", "gates")
        }
        sections |= {name: {} for name in ("register", "promote", "export", "retrain")} | {"train": {"max_steps": 1}}
        self.settings = Settings.model_validate(sections)
        report = {"adapter_digest": PARTS["adapter"], "base_digest": PARTS["base"], "dataset_digest": PARTS["data"]}
        report |= {"tokenizer_digest": PARTS["tokenizer"], "params_digest": PARTS["params"]}
        for stage in ("train", "evaluate"):
            with commit_dir(self.layout.stage(stage)) as folder:
                write_json(folder / "report.json", report)
        monkeypatch.setattr(retrain.pipeline, "changed", lambda layout: self.changed)
        monkeypatch.setattr(retrain, "find_champion", lambda params, layout: self.champion)
        monkeypatch.setattr(retrain, "versions", lambda params, layout: self.versions)
        monkeypatch.setattr(retrain, "ledger", lambda params, layout: self.ledger)

    @property
    def champion(self) -> Version | None:
        return next((each for each in self.versions if "champion" in each.aliases), None)

    def plan(self, fingerprint: str | None = None) -> retrain.Plan:
        return retrain.plan(self.layout, self.settings, fingerprint)

    def export(self, of: str = PRESENT) -> None:
        made = {"adapter_digest": "a", "base": {"digest": "b"}, "tokenizer_digest": "c", "identity": of}
        key = export_key(self.settings.export, self.settings.model.quantization, of, "a", "b", "c")
        with commit_dir(self.layout.exports / of[:16]) as folder:
            write_json(folder / "certificate.json", {**made, "key": key})

    def exporting(self, **changes: Any) -> None:
        """Change the section `export`."""
        self.settings = self.settings.model_copy(update={"export": self.settings.export.model_copy(update=changes)})

    def remember(self, fingerprint: str, asked: str | None = None) -> Outcome:
        return retrain.remember(self.layout, self.settings, self.plan(asked), fingerprint)

    def conclude(self, judged: Verdict | None, registered: Version | None = None, **more: Any) -> Outcome:
        given: dict[str, Any] = {"ran": [], "fingerprint": "f", "export": None, **more}
        return retrain.conclude(self.layout, self.settings, verdict=judged, version=registered, **given)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def verdict(passed: bool) -> Verdict:
    return decide("run", [Check(name="c", passed=passed, detail="It is so.")], {"adapter": "a", "champion": "none"})


def test_a_changed_stage_is_followed_by_every_effect(world: World) -> None:
    world.changed = {"train": ["params.yaml train.learning_rate: modified"], "evaluate": ["`train` runs before it"]}
    plan = world.plan()
    assert list(plan.steps) == ["train", "evaluate", "verdict", "register", "promote", "export"]
    assert plan.steps["train"] == ["params.yaml train.learning_rate: modified"]


def test_the_champion_of_the_present_data_with_an_export_leaves_nothing_to_do(world: World) -> None:
    world.versions = [version(1, aliases=("champion",))]
    world.export()
    plan = world.plan()
    assert plan.steps == {}
    assert plan.standing is not None
    assert plan.standing.state == "nothing to do"
    assert plan.standing.lines[1] == "Version 1 is the champion."


def test_the_champion_without_an_export_is_exported_and_nothing_else(world: World) -> None:
    world.versions = [version(1, aliases=("champion",))]
    assert list(world.plan().steps) == ["export"]


def test_a_champion_exported_under_other_parameters_is_exported_again_and_keep_does_not_count(world: World) -> None:
    world.versions = [version(1, aliases=("champion",))]
    world.export()
    world.exporting(keep=9)
    assert world.plan().steps == {}
    world.exporting(dtype="fp32")
    assert world.plan().steps == {
        "export": ["the champion, version 1, lacks an export under the present `export` section"]
    }
    world.export()
    assert world.plan().steps == {}


def test_an_event_about_old_data_does_not_make_newer_data_count_as_trained(world: World) -> None:
    world.versions = [version(1, aliases=("champion",))]
    world.conclude(verdict(True), version(1))
    world.changed = {"validate": ["data/raw: modified"]}
    assert world.remember("newer", asked="f").state == "nothing to do"
    assert retrain.last_fingerprint(world.layout) == "f"
    assert next(iter(world.plan("newer").steps)) == "validate"


def test_what_is_remembered_about_the_champions_data_is_not_an_older_refusal(world: World) -> None:
    world.versions = [version(1, "other", ("champion",))]
    world.conclude(verdict(False))
    world.versions = [version(1, aliases=("champion",))]
    world.export()
    world.remember("g")
    last = retrain.last_outcome(world.layout)
    assert last is not None
    assert (last.state, last.champion, last.fingerprint) == ("promoted", 1, "g")
    assert last.key == retrain.standing_key(world.layout, world.settings)


def test_what_is_remembered_where_nothing_changed_is_the_last_outcome_with_the_new_data(world: World) -> None:
    world.versions = [version(1, "other", ("champion",))]
    refused = world.conclude(verdict(False))
    world.remember("g")
    assert retrain.last_outcome(world.layout) == refused.model_copy(update={"fingerprint": "g"})


def test_a_challenger_that_was_not_judged_is_judged(world: World) -> None:
    assert list(world.plan().steps) == ["verdict", "register", "promote", "export"]


def test_a_refusal_stands_until_champion_rules_or_challenger_change(world: World) -> None:
    world.versions = [version(1, "other", ("champion",))]
    assert world.conclude(verdict(False)).state == "rejected"
    plan = world.plan()
    assert plan.steps == {}
    assert plan.standing is not None
    assert "against: It is so." in plan.standing.lines

    stricter = world.settings.gates.model_copy(
        update={"data": world.settings.gates.data.model_copy(update={"min_rows": 7})}
    )
    rules = world.settings.model_copy(update={"gates": stricter})
    assert retrain.plan(world.layout, rules).steps != {}
    world.versions = [version(2, "another", ("champion",))]
    assert world.plan().steps != {}


def test_a_rejection_ends_with_3_and_everything_else_with_0() -> None:
    codes = {
        state: Outcome(state=state, lines=[]).exit_code
        for state in ("promoted", "rejected", "waiting", "skipped", "nothing to do")
    }  # type: ignore[arg-type]
    assert codes == {"promoted": 0, "rejected": 3, "waiting": 0, "skipped": 0, "nothing to do": 0}


def test_a_change_that_was_left_for_later_is_left_again_until_something_else_changes(world: World) -> None:
    world.versions = [version(1, "old", ("champion",))]
    world.changed = {"preprocess": ["changed dep data/work/validate"]}
    with commit_dir(world.layout.stage("validate")) as folder:
        (folder / "rows.parquet").write_bytes(b"1")
    left = Decision("skip", ["Not trained: 3 rows differ."], 1)
    outcome = world.conclude(None, decision=left)
    assert (outcome.state, outcome.champion, outcome.ran) == ("skipped", 1, [])
    assert outcome.lines == ["Not trained: 3 rows differ.", "Version 1 stays the champion."]

    again = world.plan()
    assert again.steps == {}
    assert again.standing is not None
    assert again.standing.lines[1:] == outcome.lines
    world.remember("f")
    assert world.plan().steps == {}  # remembering changed nothing

    before = world.settings
    world.settings = before.model_copy(update={"retrain": RetrainParams.model_validate({"decide": {"min_rows": 2}})})
    assert "preprocess" in world.plan().steps
    world.settings = before
    with commit_dir(world.layout.stage("validate")) as folder:
        (folder / "rows.parquet").write_bytes(b"2")
    assert "preprocess" in world.plan().steps
    with commit_dir(world.layout.stage("validate")) as folder:
        (folder / "rows.parquet").write_bytes(b"1")
    world.changed = {"train": ["changed params"]} | world.changed
    assert "train" in world.plan().steps


def test_a_registered_challenger_that_is_not_champion_waits_for_a_person(world: World) -> None:
    world.versions = [version(1)]
    outcome = world.conclude(verdict(True), version(1))
    assert outcome.state == "waiting"
    assert outcome.lines[-1] == "Version 1 is registered; `regraft promote 1` makes it champion."
    assert world.plan().steps == {}


def test_what_a_person_rolled_back_is_not_promoted_again(world: World) -> None:
    world.versions = [version(1, "old", ("champion",)), version(2)]
    world.ledger = [entry(1, "promote", None, 1), entry(2, "promote", 1, 2), entry(3, "rollback", 2, 1)]
    assert world.plan().steps == {}
    assert world.conclude(None).state == "waiting"


def test_what_was_promoted_again_after_a_rollback_is_no_longer_held_back(world: World) -> None:
    world.versions = [version(1, "old", ("champion",)), version(2)]
    world.ledger = [
        entry(1, "promote", None, 2),
        entry(2, "rollback", 2, 1),
        entry(3, "promote", 1, 2),
        entry(4, "promote", 2, 1),
    ]
    assert list(world.plan().steps) == ["verdict", "register", "promote", "export"]


def test_data_that_a_retraining_ended_with_is_not_trained_again_even_if_parameters_changed(world: World) -> None:
    world.versions = [version(1, aliases=("champion",))]
    world.conclude(verdict(True), version(1))
    world.changed = {"train": ["params.yaml train: modified"]}
    assert world.plan("f").steps == {}
    assert next(iter(world.plan("g").steps)) == "train"


def test_the_words_of_a_plan_name_reasons_and_the_time_of_the_last_run(world: World) -> None:
    world.changed = {"train": ["params.yaml train.rank: modified"]}
    write_json(world.layout.outcome("train"), {"exit_code": 0, "seconds": 120.0})
    lines = world.plan().lines()
    assert lines[0] == "train      about 2 min  params.yaml train.rank: modified"
    assert lines[-1] == "about 2 min in all, by the last time each ran, and what is not known yet"


def test_one_retraining_at_a_time_and_one_process_may_enter_twice(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom regraft import retrain\nfrom regraft.layout import Layout\n"
        f"with retrain.exclusive(Layout(Path({str(tmp_path)!r}))):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(Busy, match=f"process {other.pid} holds"), retrain.exclusive(Layout(tmp_path)):
            pass
        assert other.stdin is not None
        other.stdin.close()
        with retrain.exclusive(Layout(tmp_path), patience=30), retrain.exclusive(Layout(tmp_path)):
            pass
