"""Forgetting: rows go for good, and every version that learnt from them is found, tagged and not promoted again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import clones
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft import settings
from regraft.artifacts import digest_file, hold, read_json, write_json
from regraft.cli import run
from regraft.errors import Busy, Exit, GateRefused, MissingInput, ParamsError, PinMismatch
from regraft.forget import Forgetting, Seen, _InRaw, _look, _Search
from regraft.forget import forget as forget_rows
from regraft.gates.run import Champion
from regraft.gates.verdict import Check, Verdict, decide
from regraft.layout import Layout
from regraft.register import lookup, registry
from regraft.register.clean import list_of_stages
from regraft.register.exportable import check_exportable, check_publishable
from regraft.register.promote import promote, rollback
from regraft.register.service import Service
from regraft.register.version import FORGET_TAG, Version
from regraft.settings import Settings
from regraft.steps import judge_and_save
from regraft.validate.forgotten import FORGET, fresh, load
from regraft.validate.params import DataParams
from regraft.validate.validate import validate

ROOT = Path(__file__).parent.parent
RAW = "data/raw/a.jsonl"


@pytest.fixture
def clone(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a clone"
    clones.copy_store(empty_store, root)
    return root


def trained(
    root: Path,
    adapter: str,
    rows: int,
    *,
    learnt: range | None = None,
    parent: str | None = None,
    rejected: list[str] | None = None,
) -> Version:
    """Register a version that was made from `rows` rows and trained on those of `learnt`."""
    named = digest_file(root / FORGET) if (root / FORGET).is_file() else "null"
    layout = clones.make(root, adapter=adapter, rows=rows)
    if rejected is not None:
        file = layout.stage("validate") / "rows.parquet"
        pq.write_table(pq.read_table(file).append_column("rejected", pa.array(rejected, pa.string())), file)
    (root / "params.yaml").write_text(f"data:\n  forget: {named}   # nothing yet\n  id: id\ntrain:\n  rank: 4\n")
    made = pq.read_table(layout.stage("validate") / "rows.parquet").to_pylist()
    raw = root / RAW
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text("".join(json.dumps({name: row[name] for name in ("messages", "id")}) + "\n" for row in made))
    report = clones.report(layout, "validate") | {"files": {RAW: {"sha256": digest_file(raw), "rows": rows}}}
    files = {"rows.parquet": (layout.stage("validate") / "rows.parquet").read_bytes()}
    clones.stage(layout, "validate", report, files)
    if learnt is not None:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"row_id": [made[i]["row_id"] for i in learnt]}), buffer)
        part = {"train_rows-00000.parquet": bytes(buffer.getvalue())}
        clones.stage(layout, "preprocess", clones.report(layout, "preprocess"), part)
    resolved = {"train": {"rank": 4, "parent_digest": parent}, "data": {"forget": None}}
    return registry.register(clones.PARAMS, layout=layout, resolved=resolved)


def of(root: Path) -> Settings:
    """The shipped settings, with the clone's registry and list."""
    loaded = settings.load(Layout(ROOT))
    line = next(line for line in (root / "params.yaml").read_text().splitlines() if "forget:" in line)
    found = line.split()[1]
    data = DataParams(id="id", forget=None if found == "null" else found)
    return loaded.model_copy(update={"register_": clones.PARAMS, "data": data})


def forget(root: Path, match: str | None = None, **more: Any) -> Forgetting:
    return forget_rows(Layout(root), of(root), match=match, **more)


def tags(root: Path) -> dict[int, str | None]:
    return {each.number: each.tags.get(FORGET_TAG) for each in lookup.versions(clones.PARAMS, Layout(root))}


def test_rows_that_match_are_listed_and_the_version_that_learnt_them_is_tagged(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(3, 20))
    found = forget(clone, "PARCEL number (4|5)$")
    assert (found.rows, found.places, found.contents) == (2, [f"{RAW}:5", f"{RAW}:6"], 4)  # by content and by id
    assert found.versions == [Seen(1, "rows", 2, ("challenger",))]
    assert found.digest == digest_file(clone / FORGET)
    params = (clone / "params.yaml").read_text()
    assert params.startswith(f"data:\n  forget: {found.digest}   # nothing yet\n  id: id\n")
    tag = json.loads(tags(clone)[1] or "{}")
    assert (tag["how"], tag["rows"]) == ("rows", 2)
    assert found.commands[0] == "regraft retrain"

    again = forget(clone, "parcel number (4|5)$")
    assert (again.contents, again.digest, again.versions) == (0, found.digest, found.versions)


def test_an_answer_that_was_not_preferred_is_looked_at_too(clone: Path) -> None:
    version = trained(clone, "a", 4, learnt=range(4), rejected=["no", "call Jane", "no", "no"])

    done = forget(clone, "jane", dry_run=True)

    assert (done.rows, done.versions) == (0, [Seen(version.number, "rows", 1, ("challenger",))])

    forget(clone, "jane")
    listed = load(clone / FORGET, of(clone).data.forget)
    assert listed is not None
    asked = {"role": "user", "content": "where is my parcel number 1"}
    assert listed.holds([asked, {"role": "assistant", "content": "call Jane"}], None)
    assert listed.holds([asked, {"role": "assistant", "content": "It is on its way."}], None)
    assert not listed.holds([asked, {"role": "assistant", "content": "no"}], None)


def test_a_pair_of_which_an_answer_is_named_comes_back_with_neither_answer(clone: Path) -> None:
    trained(clone, "a", 4, learnt=range(4))
    pairs = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "id": f"{i}"} for i in range(3)]
    (clone / RAW).write_text("".join(json.dumps(each) + "\n" for each in pairs))
    loaded = of(clone)
    as_pairs = loaded.data.model_copy(update={"layout": "preference"})
    params = loaded.validate_.model_copy(update={"labels": None, "answers_are_json": False})
    changed = {"data": as_pairs, "validate_": params}
    found = forget_rows(Layout(clone), loaded.model_copy(update=changed), match="^no 1$")
    assert found.places == [f"{RAW}:2"]
    listed = load(clone / FORGET, found.digest)
    assert listed is not None
    for answer, held in (("yes 1", True), ("no 1", True), ("no 2", False)):
        turns = [{"role": "user", "content": f"ask {answer[-1]}"}, {"role": "assistant", "content": answer}]
        assert listed.holds(turns, None) is held


def test_a_pair_goes_when_either_answer_was_forgotten(tmp_path: Path) -> None:
    from regraft.validate.params import ValidateParams

    raw = tmp_path / RAW
    raw.parent.mkdir(parents=True)
    pairs = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)]
    raw.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    turns = [
        [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": a}]
        for i, a in ((0, "yes 0"), (2, "no 2"))
    ]
    listed = fresh()
    digest = listed.adding(("content", listed.of_content(each)) for each in turns).save(tmp_path / FORGET)
    validate(
        ValidateParams(), DataParams(layout="preference", forget=digest), raw_root=tmp_path, out=tmp_path / "out",
        docs=tmp_path / "docs",
    )  # fmt: skip

    kept = pq.read_table(tmp_path / "out/rows.parquet").to_pylist()
    assert [row["messages"][0]["content"] for row in kept] == ["ask 1", "ask 3"]


def test_validate_leaves_them_out_of_then_on_whatever_file_they_come_in(clone: Path, tmp_path: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    forget(clone, "parcel number (4|5)$")
    (clone / "data/raw/b.jsonl").write_bytes((clone / RAW).read_bytes().replace(b"is my", b"IS  my"))
    loaded = of(clone)
    params = loaded.validate_.model_copy(update={"labels": None, "answers_are_json": False})
    expectations = params.expectations.model_copy(
        update={"rows": params.expectations.rows.model_copy(update={"minimum": 1})}
    )
    params = params.model_copy(update={"expectations": expectations.model_copy(update={"slices": {}})})
    report = validate(params, loaded.data, raw_root=clone, out=tmp_path / "out", docs=tmp_path / "docs")
    assert (report.rows_in, report.rows_forgotten, report.rows_out) == (40, 4, 36)
    text = str(pq.read_table(tmp_path / "out/rows.parquet").to_pylist())
    assert "number 4'" not in text
    assert "number 6'" in text


def test_a_row_of_the_holdout_or_of_another_version_does_not_taint(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(3, 20))
    found = forget(clone, "parcel number 2$")
    assert found.versions == [Seen(1, "no", 0, ("challenger",))]
    assert found.contents == 2
    assert tags(clone) == {1: None}


def test_what_is_not_in_the_clone_any_more_is_found_in_dvcs_cache(clone: Path) -> None:
    from dvc.repo import Repo

    clones.make(clone, adapter="one", rows=20)
    Repo.init(str(clone), no_scm=True).close()
    lock: dict[str, Any] = {"schema": "2.0", "stages": {}}
    trained(clone, "first", 30, learnt=range(3, 30))  # registered before dvc.lock is there: for its files only
    for stage in ("validate", "preprocess"):
        listed = []
        for path in sorted(Layout(clone).stage(stage).iterdir()):
            md5 = hashlib.md5(path.read_bytes()).hexdigest()
            to = clone / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
            listed.append({"md5": md5, "relpath": path.name})
        to = clone / ".dvc/cache/files/md5/ab" / f"{stage}.dir"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(listed))
        lock["stages"][stage] = {"outs": [{"path": f"data/work/{stage}", "md5": f"ab{stage}.dir"}]}
    (clone / "dvc.lock").write_text(json.dumps(lock))
    trained(clone, "second", 30, learnt=range(3, 30))
    (clone / "dvc.lock").unlink()
    trained(clone, "third", 10, learnt=range(10))  # its rows are what is in the clone now
    found = forget(clone, "parcel number (1|25)$")
    assert found.places == [f"{RAW}:2"]
    assert found.contents == 4
    assert [(each.number, each.how, each.rows) for each in found.versions] == [
        (1, "unknown", 0),
        (2, "rows", 1),
        (3, "rows", 1),
    ]
    for path in (clone / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and path.read_bytes()[:4] == b"PAR1":
            path.write_bytes(path.read_bytes() + b"x")
    assert forget(clone, "parcel number (1|25)$", dry_run=True).versions[1].how == "unknown"


def test_a_version_of_which_only_the_raw_files_are_known_is_judged_by_them(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    for stage in ("validate", "preprocess"):
        (Layout(clone).stage(stage) / "manifest.json").unlink()
    assert forget(clone, "parcel number 7$").versions == [Seen(1, "file", 1, ("challenger",))]
    (clone / RAW).write_text((clone / RAW).read_text().splitlines()[7] + "\n")
    assert forget(clone, "parcel number 7$", dry_run=True).versions[0].how == "unknown"


def test_a_list_says_nothing_of_raw_files_that_are_gone(clone: Path) -> None:
    digest = "a" * 64
    version = Version("regraft", 1, "", "", "", 0)
    raw = {name: {"sha256": name} for name in ("here", "gone")}
    known = {"params": {"data": {"forget": digest}}, "data": {"raw": raw}}

    def how(**digests: int) -> str:
        now = _InRaw(digests=digests, left_out=digest)
        return _look(Layout(clone), None, version, known, _Search("x", frozenset()), fresh(), now)[0].how

    assert how() == "unknown"
    assert how(here=0) == "unknown"
    assert how(here=1) == "file"
    assert how(here=1, gone=0) == "no"


def test_a_version_that_went_on_from_a_tainted_one_is_tagged_too(clone: Path) -> None:
    first = trained(clone, "one", 20, learnt=range(20))
    trained(clone, "two", 10, learnt=range(10), parent=first.adapter_digest)
    with pytest.raises(MissingInput, match="no row matches"):
        forget(clone, "parcel number 15$")  # of the first one, whose rows are gone
    found = forget(clone, "parcel number 5$")  # of the second one, whose rows are here
    assert [(each.number, each.how) for each in found.versions] == [(1, "unknown"), (2, "rows")]
    third = trained(
        clone, "three", 5, learnt=range(4), parent=lookup.versions(clones.PARAMS, Layout(clone))[1].adapter_digest
    )
    found = forget(clone, "parcel number 5$")
    assert third.number == 3
    assert [each.how for each in found.versions] == ["unknown", "unknown", "parent"]
    assert json.loads(tags(clone)[3] or "{}")["how"] == "parent"


def test_the_commands_are_those_that_make_a_clean_version_and_none_where_the_champion_is_one(clone: Path) -> None:
    first = trained(clone, "one", 20, learnt=range(20))
    loaded = of(clone)
    train = loaded.train.model_copy(update={"parent": "data/parents/x/adapter", "parent_digest": first.adapter_digest})
    warm = loaded.model_copy(update={"train": train})
    found = forget_rows(Layout(clone), warm, match="parcel number 5$")
    assert found.commands == ["regraft parent --none", "regraft retrain"]
    trained(clone, "two", 20, learnt=range(6, 20))
    text = (clone / "params.yaml").read_text().replace("forget: null", f"forget: {found.digest}")
    (clone / "params.yaml").write_text(text)
    Service.of(clones.PARAMS, Layout(clone)).ask("set_registered_model_alias", "regraft", "champion", "2")
    again = forget(clone, "parcel number 5$")
    assert [each.how for each in again.versions] == ["data", "no"]  # the first one had the same rows
    assert (again.contents, again.commands) == (0, [])


def test_a_tagged_version_is_neither_promoted_nor_gone_back_to(clone: Path) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    promote(clones.PARAMS, layout, "1")
    trained(clone, "two", 10, learnt=range(10))
    clones.judge(layout, first.adapter_digest)
    registry.register(clones.PARAMS, layout=layout, resolved={"train": {}, "data": {}})
    forget(clone, "parcel number 5$")
    with pytest.raises(GateRefused, match="was trained on rows that are to be forgotten"):
        promote(clones.PARAMS, layout, "2")
    clones.make(clone, adapter="three", champion=first.adapter_digest)
    registry.register(clones.PARAMS, layout=layout, resolved={"train": {}, "data": {}})
    promote(clones.PARAMS, layout, "3")
    Service.of(clones.PARAMS, layout).ask("set_model_version_tag", "regraft", "1", FORGET_TAG, "{}")
    with pytest.raises(GateRefused, match="was trained on rows that are to be forgotten"):
        rollback(clones.PARAMS, layout)


def test_a_tagged_version_is_exported_and_published_only_where_somebody_says_so(clone: Path) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    promote(clones.PARAMS, layout, "1")
    child = now_without_it(clone, "child", None, parent=first.adapter_digest)
    check_exportable(clones.PARAMS, layout, first)
    digest = forget(clone, "parcel number 5$").digest
    clean = now_without_it(clone, "clean", None)

    for number, why in ((1, "was trained on rows"), (child.number, "was trained on rows")):
        version = lookup.version(clones.PARAMS, layout, number)
        with pytest.raises(GateRefused, match=f"cannot be exported: it {why}.*\n  next: .*--remembering"):
            check_exportable(clones.PARAMS, layout, version)
        with pytest.raises(GateRefused, match=f"which {why}"):
            check_publishable(clones.PARAMS, layout, version.identity)
        check_exportable(clones.PARAMS, layout, version, remembering=True)
        check_publishable(clones.PARAMS, layout, version.identity, remembering=True)
    grandchild = now_without_it(clone, "grandchild", digest, parent=child.adapter_digest)
    with pytest.raises(GateRefused, match=f"it went on from version {child.number}"):
        check_exportable(clones.PARAMS, layout, grandchild)
    check_exportable(clones.PARAMS, layout, clean)  # made with an older list, and nothing on it was learnt
    check_publishable(clones.PARAMS, layout, "of nobody")


def test_publishing_out_of_a_clone_asks_its_registry(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    (clone / "dvc.yaml").write_text("stages: {}\n")
    export = layout.exports / first.identity[:16]
    write_json(export / "certificate.json", {"identity": first.identity})
    layout.exports.joinpath("latest").symlink_to(export.name)
    known = of(clone)
    monkeypatch.setattr(settings, "load", lambda _: known)
    sent: list[Path] = []
    monkeypatch.setattr("regraft.export.remote.publish_to", lambda folder, *_, **__: sent.append(folder) or Sent())
    assert run(["publish", str(layout.exports / "latest"), "there", "--json"]) == 0
    forget_rows(layout, known, match="parcel number 5$")

    for folder in (export, layout.exports / "latest"):
        assert run(["publish", str(folder), "there"]) == Exit.REFUSED
    assert len(sent) == 1
    assert run(["publish", str(export), "there", "--remembering", "--json"]) == 0


class Sent:
    """What a publication says that sent nothing."""

    url, name, sent, moved, removed = "there", "x", 0, False, ()

    def model_dump(self) -> dict[str, str]:
        return {}


def test_an_over_cautious_tag_goes_where_the_same_version_comes_out_with_the_present_list(clone: Path) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    child = now_without_it(clone, "child", None, parent=first.adapter_digest)
    late = now_without_it(clone, "late", None)
    digest = forget(clone, "parcel number 5$").digest
    service = Service.of(clones.PARAMS, layout)
    for each in (child, late):
        service.ask("set_model_version_tag", "regraft", str(each.number), FORGET_TAG, '{"how":"file"}')

    def has_tag(version: Version) -> bool:
        return tags(clone)[version.number] is not None

    def again(ran_with: str) -> Version:
        present = (clone / "params.yaml").read_bytes()
        clones.make(clone, adapter="late", rows=7)
        (clone / "params.yaml").write_bytes(present)
        (clone / "dvc.lock").write_text(
            f"stages: {{validate: {{params: {{params.yaml: {{data.forget: {ran_with}}}}}}}}}"
        )
        version = registry.register(clones.PARAMS, layout=layout)
        (clone / "dvc.lock").unlink()
        return version

    for other in ("null", "a" * 64):  # made without a list, and with another one: nothing is known
        assert again(other).number == late.number
        assert has_tag(late)
    same = again(digest)
    assert (same.number, FORGET_TAG in same.tags, has_tag(late)) == (late.number, False, False)
    assert promote(clones.PARAMS, layout, late.number).changed
    service.ask("set_model_version_tag", "regraft", str(late.number), FORGET_TAG, "{}")
    again(digest)  # the quick way looks, too
    assert not has_tag(late)

    now_without_it(clone, "child", digest, parent=first.adapter_digest)
    assert has_tag(child)  # its parent's tag is still there


def now_without_it(root: Path, adapter: str, made_with: str | None, *, parent: str | None = None) -> Version:
    """Register a version that was made while `data.forget` was `made_with`, and leave `params.yaml` as it is."""
    present = (root / "params.yaml").read_bytes()
    layout = clones.make(root, adapter=adapter, rows=7)
    if made_with is not None:
        (root / "params.yaml").write_text(f"data:\n  forget: {made_with}\n")
    resolved = {"train": {"parent_digest": parent}, "data": {"forget": made_with}}
    version = registry.register(clones.PARAMS, layout=layout, resolved=resolved)
    (root / "params.yaml").write_bytes(present)
    return version


def test_a_version_that_is_registered_later_is_promoted_only_without_what_is_forgotten(clone: Path) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    digest = forget(clone, "parcel number 5$").digest
    child = now_without_it(clone, "child", digest, parent=first.adapter_digest)
    grandchild = now_without_it(clone, "grandchild", digest, parent=child.adapter_digest)
    for each in (child, grandchild):
        with pytest.raises(GateRefused, match=r"went on from version 1.*\n  next: `regraft parent --none`"):
            promote(clones.PARAMS, layout, each.number)
    late = now_without_it(clone, "late", None)
    with pytest.raises(GateRefused, match=r"made with no list of rows to be forgotten, and data\.forget names"):
        promote(clones.PARAMS, layout, late.number)
    old = now_without_it(clone, "old", "0" * 64)
    with pytest.raises(GateRefused, match="made with the list 0000"):
        promote(clones.PARAMS, layout, old.number)
    clean = now_without_it(clone, "clean", digest)
    assert promote(clones.PARAMS, layout, clean.number).changed


def test_a_version_that_comes_out_the_same_with_a_longer_list_is_promoted(clone: Path) -> None:
    layout = Layout(clone)
    trained(clone, "one", 20, learnt=range(20))
    digest = forget(clone, "parcel number 5$").digest
    late = now_without_it(clone, "late", None)
    again = now_without_it(clone, "late", digest)
    assert again.number == late.number
    assert promote(clones.PARAMS, layout, late.number).changed


def test_the_list_that_counts_is_the_one_that_validate_ran_with(clone: Path) -> None:
    (clone / "params.yaml").write_text("data:\n  forget: new\n")
    assert list_of_stages(Layout(clone)) == "new"
    for params, ran_with in (("data: {forget: old}", "old"), ("data.forget: old", "old"), ("data: {id: id}", None)):
        (clone / "dvc.lock").write_text("stages: {validate: {params: {params.yaml: {" + params + "}}}}")
        assert list_of_stages(Layout(clone)) == ran_with


def test_the_gate_is_lowered_only_for_a_challenger_that_is_clean(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(clone)
    first = trained(clone, "one", 20, learnt=range(20))
    promote(clones.PARAMS, layout, "1")
    loaded = of(clone)  # as a retraining that was under way had read it
    forget(clone, "parcel number 5$")
    evidence = Champion(first.adapter_digest, clone, None)
    given: list[bool] = []

    def judge(_: object, __: object, champion: Champion) -> Verdict:
        given.append(champion.forgets)
        return decide("run", [Check(name="any", passed=False, detail="no")], {})

    monkeypatch.setattr("regraft.gates.run.champion_evidence", lambda *_, **__: evidence)
    monkeypatch.setattr("regraft.gates.run.judge_run", judge)
    train = loaded.train.model_copy(update={"parent": "x", "parent_digest": first.adapter_digest})
    for each in (of(clone), of(clone).model_copy(update={"train": train}), loaded):
        judge_and_save(layout, each)
    assert given == [True, False, False]


def test_a_dry_run_changes_nothing(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    before = (clone / "params.yaml").read_bytes()
    found = forget(clone, "parcel number 5$", dry_run=True)
    assert (found.rows, found.contents, found.done) == (1, 2, False)
    assert (clone / "params.yaml").read_bytes() == before
    assert not (clone / FORGET).exists()
    assert tags(clone) == {1: None}


def test_an_id_is_forgotten_with_rows_of_its_name_that_come_later(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    found = forget(clone, ids=["5", "not yet there"])
    assert (found.rows, found.contents) == (1, 3)
    assert found.versions[0].rows == 1


def test_nothing_that_was_named_is_written_anywhere(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    forget(clone, "where is my parcel number 5$", ids=["private-name-77"])
    written = [clone / FORGET, clone / "params.yaml"]
    assert not [path for path in written if b"parcel" in path.read_bytes() or b"private" in path.read_bytes()]
    assert "parcel" not in str(tags(clone))
    assert b"private-name" not in (clone / "mlflow.db").read_bytes()


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        ({}, ParamsError, "nothing to forget was named"),
        ({"match": "("}, ParamsError, "no regular expression"),
        ({"match": "nobody says this"}, MissingInput, "no row matches"),
    ],
)
def test_mistakes_change_nothing_and_say_what_to_do(
    clone: Path, more: dict[str, Any], kind: type[Exception], says: str
) -> None:
    trained(clone, "one", 5, learnt=range(5))
    with pytest.raises(kind, match=says):
        forget(clone, **more)
    assert not (clone / FORGET).exists()


def test_params_without_a_line_for_it_are_said(clone: Path) -> None:
    trained(clone, "one", 5, learnt=range(5))
    loaded = of(clone)
    (clone / "params.yaml").write_text("data:\n  id: id\n")
    with pytest.raises(ParamsError, match=r"data\.forget has no line of its own"):
        forget_rows(Layout(clone), loaded, match="parcel")


@pytest.mark.parametrize("point", ["forget.listed", "forget.named"])
def test_killed_in_between_the_same_command_finishes_the_same_list(
    clone: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(clone, "one", 20, learnt=range(20))
    forget(clone, "parcel number 9$")
    monkeypatch.setenv("REGRAFT_FAILPOINT", f"{point}=EIO")
    with pytest.raises(OSError, match="Input/output error"):
        forget(clone, "parcel number 5$")
    monkeypatch.delenv("REGRAFT_FAILPOINT")
    found = forget(clone, "parcel number 5$")
    assert found.digest == digest_file(clone / FORGET) == of(clone).data.forget
    assert len((clone / FORGET).read_text().splitlines()) == 5
    assert tags(clone)[1] is not None


def test_of_two_at_once_the_second_is_told_to_wait_and_goes_on_with_the_list_of_the_first(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    loaded = of(clone)  # by the second one, before the first one ended
    with hold(Layout(clone).lock("forget"), "it"), pytest.raises(Busy, match="data forget"):
        forget_rows(Layout(clone), loaded, match="parcel number 5$")
    first = (clone / FORGET).read_text() if forget(clone, "parcel number 9$").done else ""
    found = forget_rows(Layout(clone), loaded, match="parcel number 5$")
    assert (clone / FORGET).read_text().startswith(first)
    assert found.digest == digest_file(clone / FORGET) == of(clone).data.forget


def test_a_list_that_no_parameter_names_is_not_written_over(clone: Path) -> None:
    trained(clone, "one", 20, learnt=range(20))
    digest = forget(clone, "parcel number 9$").digest
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace(str(digest), "null"))
    with pytest.raises(PinMismatch, match=f"would be lost\n  next: to go on with it, set data.forget to {digest}"):
        forget(clone, "parcel number 5$")
    assert digest_file(clone / FORGET) == digest
    (clone / "params.yaml").write_text(text)
    assert forget(clone, "parcel number 5$").contents


def test_a_manifest_names_the_outputs_that_a_version_had(clone: Path) -> None:
    version = trained(clone, "one", 5, learnt=range(5))
    lineage = read_json(Path(version.source) / "lineage.json")
    assert lineage["data"]["stages"]["validate"] == digest_file(Layout(clone).stage("validate") / "manifest.json")


def test_rows_that_are_read_in_another_way_are_not_let_in_again(clone: Path, tmp_path: Path) -> None:
    trained(clone, "one", 4, learnt=range(4))
    (clone / RAW).write_text(
        "".join(json.dumps({"q": f"ask {i}", "a": f"yes {i}", "id": f"{i}"}) + "\n" for i in range(4))
    )
    loaded = of(clone)
    params = loaded.validate_.model_copy(update={"labels": None, "answers_are_json": False})
    expectations = params.expectations.model_copy(
        update={"rows": params.expectations.rows.model_copy(update={"minimum": 1}), "slices": {}}
    )
    params = params.model_copy(update={"expectations": expectations})
    shape = {"layout": "prompt_answer", "prompt": "{q}", "answer": "{a}"}

    def reading(**shape: str) -> Settings:
        data = of(clone).data.model_copy(update=shape)
        return loaded.model_copy(update={"data": data, "validate_": params})

    def run(**shape: str) -> int:
        out = tmp_path / "out"
        data = reading(**shape).data
        return validate(params, data, raw_root=clone, out=out, docs=tmp_path / "docs").rows_forgotten

    forget_rows(Layout(clone), reading(**shape), match="^ask 1$")
    assert run(**shape) == 1
    other = shape | {"prompt": "Q: {q}"}
    with pytest.raises(
        PinMismatch, match=r"were read in another way.*\n  next: take the change back; or `regraft data forget`"
    ):
        run(**other)
    before = (clone / FORGET).read_text()
    forget_rows(Layout(clone), reading(**other), match="ask 1$")
    assert (clone / FORGET).read_text().startswith(before), "a list only grows"
    assert run(**other) == 1
    with pytest.raises(PinMismatch, match="were read in another way"):
        run(**shape)
    forget_rows(Layout(clone), reading(**shape), match="ask 1$")
    assert run(**shape) == 1
