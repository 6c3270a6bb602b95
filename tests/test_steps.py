"""The steps call the library once, in the right order, and the second time changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from regraft import pipeline, steps
from regraft.artifacts import commit_dir, write_json
from regraft.errors import GateRefused, MissingInput, StageFailed
from regraft.layout import Layout
from regraft.register.version import Version, identity

REPORT = {
    "adapter_digest": "a",
    "base_digest": "b",
    "tokenizer_digest": "c",
    "dataset_digest": "d",
    "params_digest": "e",
    "seed": 7,
}


class Evidence:
    def __init__(self, passed: bool) -> None:
        self.passed = passed


class Sections:
    """Sections that the replaced functions ignore."""

    register_: Any = None

    def model_dump(self, **_: object) -> dict[str, Any]:
        return {}


def test_the_present_identity_is_made_of_what_the_training_report_names(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert steps.present_identity(layout) is None
    with commit_dir(layout.stage("train")) as folder:
        write_json(folder / "report.json", REPORT)
    expected = identity(adapter="a", base="b", tokenizer="c", data="d", params="e")
    assert steps.present_identity(layout) == expected
    (layout.stage("train") / "report.json").write_text("{}")
    assert steps.present_identity(layout) is None


def test_a_stage_is_not_started_without_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="`model`, which is missing"):
        steps.bring_up(Layout(tmp_path), Sections(), "preprocess")  # type: ignore[arg-type]


def test_training_is_followed_while_it_runs_and_other_stages_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Tail:
        def __init__(self, params: object, layout: object) -> None: ...

        def __enter__(self) -> None:
            said.append("follow")

        def __exit__(self, *_: object) -> None:
            said.append("end")

    def repro(layout: Layout, stage: str, **_: object) -> pipeline.StageResult:
        said.append(stage)
        return pipeline.StageResult(stage, True, 1.0)

    monkeypatch.setattr("regraft.tracking.MetricsTail", Tail)
    monkeypatch.setattr(pipeline, "repro", repro)
    monkeypatch.setattr(pipeline, "require", lambda layout, stage: None)
    for stage in ("preprocess", "train", "evaluate"):
        steps.bring_up(Layout(tmp_path), Sections(), stage)  # type: ignore[arg-type]
    assert said == ["preprocess", "follow", "train", "end", "evaluate"]


@pytest.mark.parametrize("passed", [True, False])
def test_a_refusal_of_the_verdict_is_an_answer_and_one_of_the_evidence_is_an_error(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Version:
        raise GateRefused("no")

    monkeypatch.setattr("regraft.register.evidence.gather", lambda layout, folder: Evidence(passed))
    monkeypatch.setattr("regraft.register.registry.register", refuse)
    if passed:
        with pytest.raises(GateRefused):
            steps.register_challenger(Layout(tmp_path), Sections())  # type: ignore[arg-type]
    else:
        assert steps.register_challenger(Layout(tmp_path), Sections()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("champion", "flags"),
    [(None, ["--no-latest"]), (1, ["--no-latest", "--champion", "i1"]), (2, ["--latest", "--champion", "i2"])],
)
def test_only_the_champions_export_becomes_the_latest(
    champion: int | None, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(number: int) -> Version:
        return Version("m", number, "", "", "", 0, {"regraft.identity": f"i{number}"})

    given: list[str] = []
    layout = Layout(tmp_path)

    def run(layout: Layout, module: str, arguments: list[str], **_: object) -> None:
        given.extend(arguments)
        write_json(layout.stage("export") / "report.json", {"folder": "i2", "already_exported": False})

    monkeypatch.setattr(steps, "find_version", lambda *_: version(2))
    monkeypatch.setattr(steps, "find_champion", lambda *_: None if champion is None else version(champion))
    monkeypatch.setattr("regraft.register.exportable.check_exportable", lambda *_, **__: None)
    monkeypatch.setattr("regraft.register.fetch.fetch", lambda version, to: to)
    monkeypatch.setattr("regraft.export.certificate.verify_export", lambda folder: None)
    monkeypatch.setattr(pipeline, "run_module", run)
    steps.export_version(layout, Sections(), "2")  # type: ignore[arg-type]
    assert given[given.index("--identity") + 2 :] == flags


def test_a_version_that_may_not_be_exported_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise GateRefused("no")

    monkeypatch.setattr(steps, "find_version", lambda *_: Version("m", 2, "", "", "", 0))
    monkeypatch.setattr("regraft.register.exportable.check_exportable", refuse)
    monkeypatch.setattr("regraft.register.fetch.fetch", refuse)
    monkeypatch.setattr(pipeline, "run_module", lambda *_, **__: pytest.fail("the export was started"))
    with pytest.raises(GateRefused, match="no"):
        steps.export_version(Layout(tmp_path), Sections(), "2")  # type: ignore[arg-type]


def test_a_module_that_fails_in_its_own_process_gives_its_own_message_and_code(tmp_path: Path) -> None:
    root = tmp_path
    package = root / "regraft"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "demo.py").write_text(
        "import json, os, pathlib, sys\n"
        "print('a line')\n"
        "error = {'type': 'GateRefused', 'message': 'It differs.', 'fix': 'look'}\n"
        "outcome = {'run': os.environ['REGRAFT_RUN'], 'exit_code': 3, 'error': error, 'arguments': sys.argv[1:]}\n"
        "path = pathlib.Path('data/work/outcomes/demo.json')\npath.parent.mkdir(parents=True)\n"
        "path.write_text(json.dumps(outcome))\nsys.exit(3)\n"
    )
    said: list[str] = []
    with pytest.raises(StageFailed, match=r"It differs\.") as caught:
        pipeline.run_module(Layout(root), "demo", ["--adapter", "x"], echo=said.append)
    assert (caught.value.exit_code, caught.value.fix, said) == (3, "look", ["a line"])
    assert json.loads((root / "data/work/outcomes/demo.json").read_text())["arguments"] == ["--adapter", "x"]
