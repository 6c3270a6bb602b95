"""Preparation on a Ray cluster of two nodes: the same bytes as on one machine, and what happens when a node fails."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import DataError, MissingInput, RegraftError, ServiceUnavailable
from regraft.model.load import open_base
from regraft.preprocess import cluster, shards, work
from regraft.preprocess.cluster import ADDRESS, ClusterPool
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess

PARAMS = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        nodes.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def rows_of_talk() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"where is order {i}?"},
                {"role": "assistant", "content": f"track {i}"},
            ]
        }
        for i in range(400)
    ]


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_two_nodes_make_the_same_bytes_as_one_process(
    address: str,
    tokenizer_base: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_rows(rows_of_talk())
    for name, value in (("_LEAST", 40), ("_MOST", 90), ("_ENDS", "0")):
        monkeypatch.setattr(shards, name, value)
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "one")
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv(ADDRESS, address)
    done: list[str] = []
    submit = ClusterPool.submit
    monkeypatch.setattr(
        ClusterPool, "submit", lambda self, do, *more: done.append(do.__name__) or submit(self, do, *more)
    )

    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "two")

    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()
    assert set(done) == {"_look", "_prepare_there"}
    assert len(done) > 8


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_a_shard_whose_process_dies_is_done_again_and_an_error_there_is_an_error_here(
    address: str, tokenizer_base: Path, tmp_path: Path
) -> None:
    def die_once(mark: Path) -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        mark.with_suffix(".done").touch()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse() -> None:
        raise DataError("row 3 is not one")

    pool = ClusterPool(address, PARAMS, open_base(tokenizer_base, weights=False))
    try:
        pool.submit(die_once, tmp_path / "mark").result()
        with pytest.raises(DataError, match="row 3 is not one"):
            pool.submit(refuse).result()
        with pytest.raises(RegraftError, match="lost a shard"):
            pool.submit(die).result()
    finally:
        pool.shutdown()
    assert (tmp_path / "mark.done").exists()


@pytest.mark.service
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_would_make_other_bytes_is_refused(
    address: str, tokenizer_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cluster._made_of
    monkeypatch.setattr(cluster, "_made_of", lambda base: {**made(base), "tokenizers": "0.1", "regraft": "older"})
    pool = ClusterPool(address, PARAMS, open_base(tokenizer_base, weights=False))
    try:
        with pytest.raises(RegraftError, match="it has other regraft, tokenizers than the machine that asks"):
            pool.submit(print).result()
    finally:
        pool.shutdown()


def test_without_ray_or_without_a_cluster_it_says_so(tokenizer_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(tokenizer_base, weights=False)
    pytest.importorskip("ray")
    with pytest.raises(ServiceUnavailable, match="no Ray cluster answers at 127"):
        ClusterPool("127.0.0.1:9", PARAMS, base)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingInput, match="ray is not installed"):
        ClusterPool("auto", PARAMS, base)
