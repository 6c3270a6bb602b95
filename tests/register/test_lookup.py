"""lookup: the same answers by plain SQL as through MLflow, in milliseconds, and nothing is made by looking."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import clones
import pytest

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.layout import Layout
from regraft.register import lookup
from regraft.register.params import RegisterParams
from regraft.register.promote import promote
from regraft.register.registry import register
from regraft.register.service import Service
from regraft.register.store import store_uri
from regraft.register.version import masked

Clone = Callable[..., Layout]


def two_versions(clone: Clone) -> Layout:
    layout = clone()
    register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    promote(clones.PARAMS, layout)
    register(clones.PARAMS, layout=clone(adapter="two"), resolved=clones.RESOLVED)
    return layout


def test_sql_and_mlflow_give_the_same_versions_and_ledger(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = two_versions(clone)
    versions, ledger = lookup.versions(clones.PARAMS, layout), lookup.ledger(clones.PARAMS, layout)
    assert [(each.number, each.aliases) for each in versions] == [(1, ("champion",)), (2, ("challenger",))]
    monkeypatch.setattr(lookup, "sqlite_file", lambda uri: None)
    assert lookup.versions(clones.PARAMS, layout) == versions
    assert lookup.ledger(clones.PARAMS, layout) == ledger


def test_a_version_is_found_by_number_alias_and_identity(clone: Clone) -> None:
    layout = two_versions(clone)
    identity = lookup.version(clones.PARAMS, layout, 2).identity
    for which in (2, "2", "challenger", identity, identity[:8]):
        assert lookup.version(clones.PARAMS, layout, which).number == 2


@pytest.mark.parametrize("which", [3, "3", "winner", "0" * 64, "abc"])
def test_an_unknown_version_is_answered_with_those_there_are(clone: Clone, which: str | int) -> None:
    with pytest.raises(MissingInput, match=r"it has 1 \(champion\), 2 \(challenger\)"):
        lookup.version(clones.PARAMS, two_versions(clone), which)


def test_a_deleted_version_is_not_found(clone: Clone) -> None:
    layout = two_versions(clone)
    Service.of(clones.PARAMS, layout).client.delete_model_version("regraft", "2")
    assert [each.number for each in lookup.versions(clones.PARAMS, layout)] == [1]


def test_where_there_is_no_store_there_is_no_champion_and_none_is_made(tmp_path: Path) -> None:
    assert lookup.champion(clones.PARAMS, Layout(tmp_path)) is None
    assert lookup.ledger(clones.PARAMS, Layout(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_not_taken_for_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("something else, and long enough to be read as a header")
    with pytest.raises(DamagedArtifact, match="is not a SQLite database"):
        lookup.champion(clones.PARAMS, Layout(tmp_path))


def test_a_store_of_another_schema_is_asked_through_mlflow(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = clone()
    asked: list[str] = []
    monkeypatch.setattr(Service, "versions", lambda self, name: asked.append(name) or [])
    (layout.root / "mlflow.db").unlink()
    with sqlite3.connect(layout.root / "mlflow.db") as store:
        store.execute("CREATE TABLE other (x)")
    store.close()
    assert lookup.versions(clones.PARAMS, layout) == []
    assert asked == ["regraft"]


def test_looking_up_the_champion_loads_neither_mlflow_nor_sqlalchemy(clone: Clone) -> None:
    layout = two_versions(clone)
    code = (
        "import sys\nfrom pathlib import Path\nfrom regraft.layout import Layout\n"
        "from regraft.register import lookup\nfrom regraft.register.params import RegisterParams\n"
        f"print(lookup.champion(RegisterParams(), Layout(Path({str(layout.root)!r}))).number)\n"
        "print({'mlflow', 'sqlalchemy', 'torch', 'pandas', 'pyarrow'} & set(sys.modules))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "1\nset()\n"


def test_a_clone_that_was_moved_finds_its_files(clone: Clone, tmp_path: Path) -> None:
    moved = two_versions(clone).root.rename(tmp_path / "elsewhere")
    found = lookup.champion(clones.PARAMS, Layout(moved))
    assert found is not None
    assert (Path(found.source) / "adapter/adapter_model.safetensors").read_bytes() == b"one"


def test_a_relative_path_counts_from_the_clone_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    layout = Layout(tmp_path)
    assert store_uri(RegisterParams(), layout) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert store_uri(RegisterParams(), layout) == "http://tracking.example:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ParamsError, match=r"MLFLOW_TRACKING_URI: found './mlruns'"):
        store_uri(RegisterParams(), layout)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:", "ftp://x"])
def test_a_uri_that_keeps_no_versions_is_a_mistake_in_the_parameters(uri: str) -> None:
    with pytest.raises(ValueError, match="tracking_uri"):
        RegisterParams(tracking_uri=uri)


def test_a_password_in_a_uri_is_never_shown(clone: Clone) -> None:
    assert masked("postgresql://user:secret@db/mlflow") == "postgresql://user:***@db/mlflow"
    problem = Service("postgresql://user:secret@db/mlflow").unavailable("down")
    assert "secret" not in str(problem)
