"""lineage.json: what made a version, the same for the same thing, and what differs between two."""

import json
import socket
from pathlib import Path
from typing import Any

import clones
import pytest

from regraft.artifacts import write_json
from regraft.errors import DamagedArtifact, GateRefused
from regraft.layout import Layout
from regraft.lineage import describe, diff, lineage
from regraft.register.evidence import gather
from regraft.register.registry import register

CODE = {"commit": "c" * 40, "ref": "refs/regraft/cccccccccccccccc"}


def described(root: Path, **what: Any) -> dict[str, Any]:
    layout = clones.make(root, **what)
    return describe(layout, gather(layout, layout.verdict), CODE, resolved=clones.RESOLVED)


def test_it_names_every_part_of_what_made_a_version(tmp_path: Path) -> None:
    found = described(tmp_path)
    assert set(found) == {
        "schema_version", "identity", "data", "dvc", "code", "params", "base", "environment", "seed", "parent",
        "reports", "verdict",
    }  # fmt: skip
    assert found["code"] == CODE
    assert found["params"] == clones.RESOLVED
    assert found["data"]["raw"]["data/raw/a.jsonl"]["rows"] == 20
    assert found["base"]["quantization"] == {"bits": 4}
    assert (found["seed"], found["parent"], found["verdict"]["passed"]) == (7, None, True)
    assert set(found["reports"]) == {"model", "validate", "preprocess", "train", "evaluate"}


def test_the_same_thing_described_twice_is_the_same_and_names_no_host_and_no_folder(tmp_path: Path) -> None:
    first, second = described(tmp_path / "a"), described(tmp_path / "b")
    assert first == second
    text = json.dumps(first)
    assert socket.gethostname() not in text
    assert str(tmp_path) not in text


def test_two_equal_lineages_do_not_differ(tmp_path: Path) -> None:
    assert diff(described(tmp_path / "a"), described(tmp_path / "b")) == {}


def test_more_rows_differ_in_raw_data_by_file_and_count(tmp_path: Path) -> None:
    first, second = described(tmp_path / "a"), described(tmp_path / "b", rows=30)
    second["data"]["raw"]["data/raw/b.jsonl"] = {"sha256": "0" * 64, "rows": 5}
    found = diff(first, second)
    assert found["raw"] == {
        "data/raw/a.jsonl": {"changed": "content", "rows": [20, 30]},
        "data/raw/b.jsonl": {"changed": "added", "rows": [None, 5]},
    }
    assert found["data"]["validated.rows"] == [20, 30]
    assert not any(path.startswith("raw.") for path in found["data"])
    assert diff(second, first)["raw"]["data/raw/b.jsonl"] == {"changed": "removed", "rows": [5, None]}


def test_a_changed_parameter_differs_in_its_own_section_with_both_values(tmp_path: Path) -> None:
    first = described(tmp_path)
    second = json.loads(json.dumps(first))
    second["params"]["train"]["rank"] = 8
    second["params"]["train"]["alpha"] = 16
    assert diff(first, second) == {"params": {"train.rank": [4, 8], "train.alpha": [None, 16]}}


DVC_LOCK = """schema: '2.0'
stages:
  train:
    cmd: python -m regraft.train
    deps:
    - path: data/work/preprocess
      hash: md5
      md5: aa.dir
    params:
      params.yaml:
        train:
          rank: {rank}
    outs:
    - path: data/work/train
      hash: md5
      md5: bb.dir
  other:
    cmd: x
"""


def test_dvc_lock_gives_md5_and_parameters_of_each_stage(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "dvc.lock").write_text(DVC_LOCK.format(rank=4))
    assert described(tmp_path)["dvc"] == {
        "stages": {
            "train": {
                "deps": {"data/work/preprocess": "aa.dir"},
                "outs": {"data/work/train": "bb.dir"},
                "params": {"train": {"rank": 4}},
            }
        }
    }


def test_parameters_that_changed_since_the_stages_ran_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(DVC_LOCK.format(rank=8))
    with pytest.raises(GateRefused, match=r"params\.yaml was changed since the stages ran: train"):
        described(tmp_path)


def test_hardware_is_what_training_measured(tmp_path: Path) -> None:
    write_json(Layout(tmp_path).measurements("train"), {"hardware": {"gpu": "H200"}, "seconds": 3})
    assert described(tmp_path)["environment"]["hardware"] == {"gpu": "H200"}


def test_a_registered_lineage_comes_back_and_an_altered_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    layout = clones.make(tmp_path)
    version = register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    assert lineage(version)["identity"]["digest"] == version.identity
    path = Path(version.source) / "lineage.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(DamagedArtifact, match=r"lineage\.json differs from its manifest"):
        lineage(version)
