"""promote and rollback: one champion, one ledger, whoever is killed and whoever comes at the same time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clones
import pytest

from regraft.errors import DamagedArtifact, GateRefused, MissingInput
from regraft.layout import Layout
from regraft.register import lookup
from regraft.register import promote as module
from regraft.register.exportable import check_exportable
from regraft.register.promote import Promotion, promote, rollback
from regraft.register.registry import register
from regraft.register.service import Service
from regraft.register.version import Entry, Version, champions, shorten

Clone = Callable[..., Layout]
POINTS = ["promote.claim", "promote.claimed", "promote.ledger", "promote.alias", "promote.alias@2", "promote.done"]


def registered(clone: Clone, adapter: str, champion: str = "none") -> Version:
    return register(clones.PARAMS, layout=clone(adapter=adapter, champion=champion), resolved=clones.RESOLVED)


def promoted(clone: Clone, which: str | int = "challenger", **what: Any) -> Promotion:
    return promote(clones.PARAMS, Layout(root(clone)), which, **what)


def root(clone: Clone) -> Path:
    folder: Path = clone.args[0]  # type: ignore[attr-defined]
    return folder


def state(clone: Clone) -> tuple[int | None, list[tuple[str, int | None, int]], list[str]]:
    """The champion, the ledger, and the registered models there are."""
    layout = Layout(root(clone))
    champion = lookup.champion(clones.PARAMS, layout)
    ledger = [(each.action, each.previous, each.version) for each in lookup.ledger(clones.PARAMS, layout)]
    models = [each.name for each in Service.of(clones.PARAMS, layout).client.search_registered_models()]
    return None if champion is None else champion.number, ledger, models


def three_champions(clone: Clone) -> list[Version]:
    made = []
    for adapter in ("one", "two", "three"):
        made.append(registered(clone, adapter, made[-1].adapter_digest if made else "none"))
        promoted(clone)
    return made


def test_promoting_moves_the_alias_and_writes_one_entry(clone: Clone) -> None:
    version = registered(clone, "one")
    done = promoted(clone, reason="first one")
    assert (done.version.number, done.previous, done.changed) == (1, None, True)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])
    (entry,) = lookup.ledger(clones.PARAMS, Layout(root(clone)))
    assert entry == done.entry
    assert (entry.adapter, entry.verdict) == (version.adapter_digest, version.verdict_digest)
    assert entry.reason == "first one"


def test_promoting_the_champion_again_changes_nothing_and_says_so(clone: Clone) -> None:
    registered(clone, "one")
    promoted(clone)
    done = promoted(clone)
    assert (done.version.number, done.previous, done.changed) == (1, 1, False)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


def test_a_verdict_against_an_earlier_champion_is_refused_and_both_are_named(clone: Clone) -> None:
    first = registered(clone, "one")
    registered(clone, "two")
    promoted(clone, 1)
    with pytest.raises(GateRefused) as refused:
        promoted(clone, 2)
    assert "against the champion none" in refused.value.message
    assert f"it is regraft version 1 ({first.adapter_digest[:8]})" in refused.value.message
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


def test_judged_again_against_the_present_champion_it_is_promoted(clone: Clone) -> None:
    first = registered(clone, "one")
    registered(clone, "two")
    promoted(clone, 1)
    registered(clone, "two", first.adapter_digest)
    assert promoted(clone).version.number == 2


def test_a_version_that_was_refused_later_is_not_promoted(clone: Clone) -> None:
    registered(clone, "one")
    layout = Layout(root(clone))
    clones.judge(layout, "none", passed=False)
    with pytest.raises(GateRefused):
        register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    with pytest.raises(GateRefused, match="it was refused: Better: no"):
        promoted(clone)
    assert state(clone)[0] is None


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "lineage.json", "manifest.json"])
def test_a_version_with_an_altered_byte_is_not_promoted(clone: Clone, name: str) -> None:
    version = registered(clone, "one")
    path = Path(version.source) / name
    path.write_bytes(path.read_bytes().replace(b"e", b"f", 1))
    with pytest.raises(DamagedArtifact):
        promoted(clone)
    assert state(clone) == (None, [], ["regraft"])


def test_a_verdict_with_an_altered_byte_is_none(clone: Clone) -> None:
    version = registered(clone, "one")
    path = Path(version.source) / "verdict.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(GateRefused, match="no verdict with the digest in its tag"):
        promoted(clone)


def test_a_version_that_another_tool_made_is_not_promoted(clone: Clone) -> None:
    registered(clone, "one")
    client = Service.of(clones.PARAMS, Layout(root(clone))).client
    client.create_model_version("regraft", "/nowhere")
    with pytest.raises(GateRefused, match="not registered by Regraft"):
        promoted(clone, 2)


def test_a_promoter_that_is_overtaken_after_its_checks_is_refused(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(clone, "one")
    registered(clone, "two")
    others = []

    def overtake(name: str) -> None:
        if name == "promote.claim" and not others:
            others.append(name)
            promoted(clone, 2)

    monkeypatch.setattr(module, "failpoint", overtake)
    with pytest.raises(GateRefused, match="it is regraft version 2"):
        promoted(clone, 1)
    assert state(clone) == (2, [("promote", None, 2)], ["regraft"])


def test_a_claim_that_comes_too_late_writes_nothing(clone: Clone) -> None:
    registered(clone, "one")
    registered(clone, "two")
    done = promoted(clone, 1)
    assert done.entry is not None
    late = Entry(**{**done.entry.to_dict(), "version": 2})
    client = Service.of(clones.PARAMS, Layout(root(clone))).client
    client.create_registered_model("regraft--promotion-000001", tags={"regraft.entry": module._json(late)})
    assert promoted(clone, 1).changed is False
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


def test_a_state_read_in_the_middle_of_a_change_is_not_taken_for_one_moved_by_hand(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registered(clone, "one")
    promoted(clone)
    registered(clone, "two", first.adapter_digest)
    read, torn = module._read, []

    def torn_read(*args: Any) -> Any:
        found = read(*args)
        if not torn:
            torn.append(True)
            return module._State(found.versions, [], found.champion)  # the alias was read late, the ledger early
        return found

    monkeypatch.setattr(module, "_read", torn_read)
    assert promoted(clone).version.number == 2


def test_a_model_with_the_name_of_a_claim_that_is_none_is_named(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(clone, "one")
    Service.of(clones.PARAMS, Layout(root(clone))).client.create_registered_model("regraft--promotion-000001")
    monkeypatch.setattr(module, "_ROUNDS", 2)
    with pytest.raises(DamagedArtifact, match="regraft--promotion-000001 is not a claim"):
        promoted(clone)


@pytest.mark.parametrize("point", POINTS)
def test_after_an_error_at_any_point_a_second_try_promotes_exactly_once(
    clone: Clone, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(clone, "one")
    monkeypatch.setenv("REGRAFT_FAILPOINT", f"{point}=EIO")
    with pytest.raises(OSError, match="Input/output error"):
        promoted(clone)
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    done = promoted(clone)
    assert (done.version.number, done.previous, done.changed) == (1, None, True)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


def killed_at(clone: Clone, point: str, call: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(clones.__file__).parent)!r})\n"
        "from pathlib import Path\nimport clones\nfrom regraft.layout import Layout\n"
        "from regraft.register.promote import promote, rollback\n"
        f"{call}(clones.PARAMS, Layout(Path({str(root(clone))!r})))\n"
    )
    env = {**os.environ, "REGRAFT_TESTING": "1", "REGRAFT_FAILPOINT": point}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_next_promoter_finishes_what_a_killed_one_claimed_and_is_then_refused(clone: Clone) -> None:
    registered(clone, "one")
    killed_at(clone, "promote.claimed", "promote")
    registered(clone, "two")
    assert state(clone) == (None, [], ["regraft", "regraft--promotion-000001"])
    with pytest.raises(GateRefused, match="it is regraft version 1"):
        promoted(clone)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_a_second_promote_gives_one_entry_and_the_champion(clone: Clone, point: str) -> None:
    registered(clone, "one")
    killed_at(clone, point, "promote")
    promoted(clone)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_a_second_rollback_goes_back_once(clone: Clone, point: str) -> None:
    three_champions(clone)
    killed_at(clone, point, "rollback")
    rollback(clones.PARAMS, Layout(root(clone)))
    assert state(clone)[0] == 2


@pytest.mark.faults
def test_of_two_promoters_at_once_one_wins_and_the_other_is_told_why(clone: Clone) -> None:
    registered(clone, "one")
    registered(clone, "two")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(clones.__file__).parent)!r})\n"
        "from pathlib import Path\nimport clones\nfrom regraft.layout import Layout\n"
        "from regraft.errors import GateRefused\nfrom regraft.register.promote import promote\n"
        "try:\n"
        f"    print(promote(clones.PARAMS, Layout(Path({str(root(clone))!r})), sys.argv[1]).version.number)\n"
        "except GateRefused as error:\n    print('refused' if 'made against the champion none' in str(error) else error)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, which], stdout=subprocess.PIPE, text=True)
        for which in ("1", "2", "1", "2")
    ]
    answers = [each.communicate(timeout=300)[0].strip() for each in started]
    champion, ledger, models = state(clone)
    assert (ledger, models) == ([("promote", None, champion)], ["regraft"])
    assert sorted(answers) == sorted([str(champion)] * 2 + ["refused"] * 2)


def test_rollback_goes_to_the_champion_before_and_says_which(clone: Clone) -> None:
    three_champions(clone)
    done = rollback(clones.PARAMS, Layout(root(clone)), reason="answers got worse")
    assert (done.version.number, done.previous, done.changed) == (2, 3, True)
    assert state(clone)[0] == 2
    assert lookup.ledger(clones.PARAMS, Layout(root(clone)))[-1].reason == "answers got worse"


def test_rolling_back_twice_goes_two_champions_back_and_then_there_is_none(clone: Clone) -> None:
    three_champions(clone)
    layout = Layout(root(clone))
    assert [rollback(clones.PARAMS, layout).version.number for _ in range(2)] == [2, 1]
    with pytest.raises(MissingInput, match="no champion to go back to"):
        rollback(clones.PARAMS, layout)


def test_rollback_to_a_version_that_never_was_champion_is_refused_whatever_its_verdict_says(clone: Clone) -> None:
    first = registered(clone, "one")
    promoted(clone)
    passed = registered(clone, "two", first.adapter_digest)
    assert passed.verdict == "passed"
    with pytest.raises(GateRefused, match="version 2 never was the champion") as refused:
        rollback(clones.PARAMS, Layout(root(clone)), 2)
    assert "`regraft promote 2`" in str(refused.value.fix)
    assert state(clone) == (1, [("promote", None, 1)], ["regraft"])


def test_only_a_version_that_was_champion_or_passed_its_last_verdict_may_be_exported(clone: Clone) -> None:
    def check(number: int) -> None:
        layout = Layout(root(clone))
        check_exportable(clones.PARAMS, layout, lookup.version(clones.PARAMS, layout, number))

    for adapter in ("one", "two"):
        registered(clone, adapter)
    check(2)
    promoted(clone, 1)
    for adapter in ("one", "two"):
        layout = clone(adapter=adapter, passed=False)
        with pytest.raises(GateRefused):
            register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    check(1)
    with pytest.raises(GateRefused, match="never was the champion, and it was refused: Better: no"):
        check(2)


def test_rollback_to_damaged_files_is_refused(clone: Clone) -> None:
    made = three_champions(clone)
    (Path(made[1].source) / "adapter/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedArtifact):
        rollback(clones.PARAMS, Layout(root(clone)))
    assert state(clone)[0] == 3


def test_an_interrupted_rollback_is_finished_and_goes_no_further(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    three_champions(clone)
    monkeypatch.setenv("REGRAFT_FAILPOINT", "promote.claimed=EIO")
    with pytest.raises(OSError, match="Input/output error"):
        rollback(clones.PARAMS, Layout(root(clone)))
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    done = rollback(clones.PARAMS, Layout(root(clone)))
    assert (done.version.number, done.previous, done.changed) == (2, 3, True)
    assert state(clone)[0] == 2


def test_two_rollbacks_at_once_go_back_once(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    three_champions(clone)
    others = []

    def overtake(name: str) -> None:
        if name == "promote.claim" and not others:
            others.append(name)
            rollback(clones.PARAMS, Layout(root(clone)))

    monkeypatch.setattr(module, "failpoint", overtake)
    assert rollback(clones.PARAMS, Layout(root(clone))).version.number == 2
    assert state(clone)[0] == 2


def test_an_alias_moved_by_hand_stops_promotion_until_somebody_decides(clone: Clone) -> None:
    made = three_champions(clone)
    layout = Layout(root(clone))
    Service.of(clones.PARAMS, layout).client.set_registered_model_alias("regraft", "champion", "1")
    registered(clone, "four", made[0].adapter_digest)
    with pytest.raises(GateRefused, match="on version 1, the ledger says 3: it was moved by hand"):
        promoted(clone)
    rollback(clones.PARAMS, layout, 3)
    assert state(clone)[0] == 3


def test_the_ledger_replays_into_the_stack_of_champions() -> None:
    def entry(number: int, action: Any, version: int) -> Entry:
        return Entry(number, action, None, version, "", "", "", None, "")

    steps = [("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2), ("promote", 4), ("rollback", 5)]
    entries = [entry(n, action, version) for n, (action, version) in enumerate(steps, 1)]
    assert [champions(entries[:n]) for n in range(len(steps) + 1)] == [
        [], [1], [1, 2], [1, 2, 3], [1, 2], [1, 2, 4], [1, 2, 4, 5],
    ]  # fmt: skip


def test_a_long_reason_is_cut_to_what_a_tag_holds() -> None:
    assert shorten("short") == "short"
    assert len(shorten("x" * 5000)) == 1000
