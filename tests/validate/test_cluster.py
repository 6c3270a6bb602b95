"""Validation on a Ray cluster: the same bytes as on one machine whatever dies, and a bounded number of batches under way."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filled import fill, outputs

from regraft.cluster import ADDRESS, ClusterFuture, ClusterPool
from regraft.errors import RegraftError, ServiceUnavailable
from regraft.validate import cluster, work
from regraft.validate import validate as stage_module
from regraft.validate.look import Looked

DATA = {"id": "id", "time": "at", "slices": ["kind"]}
PARAMS: dict[str, Any] = {
    "duplicates": "quarantine",
    "scripts": {"allowed": ["Latin"], "quarantine": True},
    "expectations": {"quarantined": {"share": 1.0}, "files": {"unreadable": 1}, "slices": {"kind": {"minimum": 1}}},
}


@pytest.fixture
def asked(stage: Any, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """A cluster that is asked for batches of 20 rows, and the report and the files that one process makes."""
    fill(stage, random.Random(5))
    report, files = stage.run(DATA, **PARAMS), outputs(stage.root)
    monkeypatch.setattr(stage_module, "_BATCH", 20)
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv(ADDRESS, nodes.address)
    return report, files


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_two_nodes_write_the_same_bytes_with_few_batches_under_way(
    stage: Any, asked: tuple[Any, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, result = ClusterPool.submit, ClusterFuture.result
    marks = tmp_path / "marks"
    marks.mkdir()
    under_way: list[int] = [0]

    def looked(name: str, batch: list[Any]) -> Looked:
        (marks / f"{os.getpid()}").touch()
        return work._look(name, batch)  # as it is on a node

    def given(self: Any, do: Any, *more: Any) -> Any:
        under_way.append(under_way[-1] + 1)
        return submit(self, do, *more)

    def taken(self: Any) -> Any:
        under_way.append(under_way[-1] - 1)
        return result(self)

    monkeypatch.setattr(work, "_look", looked)
    monkeypatch.setattr(ClusterPool, "submit", given)
    monkeypatch.setattr(ClusterFuture, "result", taken)

    assert stage.run(DATA, **PARAMS) == asked[0]

    assert outputs(stage.root) == asked[1]
    assert pq.read_metadata(stage.root / "out/quarantine.parquet").num_rows > 100
    assert len(under_way) > 60
    assert (max(under_way), under_way[-1]) == (5, 0), "two for each of two cores, and the one that is being taken"
    assert len(list(marks.iterdir())) >= 2
    assert not (marks / f"{os.getpid()}").exists()


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_dies_in_the_middle_changes_nothing(
    stage: Any, asked: tuple[Any, dict[str, str]], nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = nodes.add_node(num_cpus=1)
    marks = tmp_path / "marks"
    marks.mkdir()

    def looked(name: str, batch: list[Any]) -> Looked:
        import ray

        mark = marks / f"{ray.get_runtime_context().get_node_id()}-{batch[0].line}"
        mark.touch()
        time.sleep(300 if mark.name.startswith(third_id) else 0.05)  # there nothing is done before it dies
        mark.unlink()
        return work._look(name, batch)

    def kill() -> None:
        while not list(marks.glob(f"{third_id}-*")):
            time.sleep(0.05)
        nodes.remove_node(third, allow_graceful=False)

    third_id = third.node_id
    monkeypatch.setattr(work, "_look", looked)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()

    assert stage.run(DATA, **PARAMS) == asked[0]

    killer.join(60)
    assert not killer.is_alive()
    assert list(marks.glob(f"{third_id}-*")), "it died over a batch"
    assert outputs(stage.root) == asked[1]


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_a_node_with_other_code_or_libraries_is_refused_and_the_old_output_stays(
    stage: Any, asked: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_version", lambda name: "0.1" if name == "pyarrow" else cluster.version(name))
    with pytest.raises(RegraftError, match="it has other pyarrow than the machine that asks"):
        stage.run(DATA, **PARAMS)
    assert outputs(stage.root) == asked[1]


def test_a_cluster_that_does_not_answer_is_said_so_and_the_old_output_stays(
    stage: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    stage.write("a.jsonl", chat("hi"))
    stage.run()
    files = outputs(stage.root)
    monkeypatch.setenv(ADDRESS, "127.0.0.1:9")
    assert stage.run().rows_out == 1, "a little is looked at here"
    monkeypatch.setattr(work, "_LITTLE", 0)
    with pytest.raises(ServiceUnavailable, match="no Ray cluster answers at 127"):
        stage.run()
    assert outputs(stage.root) == files


def test_what_is_asked_for_decides_which_libraries_have_to_be_the_same(tmp_path: Path) -> None:
    from regraft.validate.look import Looker
    from regraft.validate.mapping import Mapping
    from regraft.validate.params import DataParams, ValidateParams
    from regraft.validate.quarantine import ROWS

    def named(**params: Any) -> dict[str, str]:
        mapping = Mapping(DataParams(), ValidateParams.model_validate(params))
        return cluster._made_of(Looker({"a": mapping}, None, ROWS))

    plain = named()
    assert set(plain) == {"regraft", "pyarrow", "numpy", "pydantic"}
    assert "none" not in plain.values()
    assert set(named(language={"allowed": ["en"]})) - set(plain) == {"py3langid"}
    more = named(personal={"model": "no_such_model"})
    assert set(more) - set(plain) == {"presidio-analyzer", "spacy", "phonenumbers", "tldextract", "no_such_model"}
    assert more["no_such_model"] == "none"
