"""Preparation on a Ray cluster of two nodes: the same bytes as on one machine, and nodes that would make others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.cluster import ADDRESS, ClusterPool
from regraft.errors import RegraftError
from regraft.model.load import open_base
from regraft.preprocess import cluster, shards, work
from regraft.preprocess.cluster import cluster_pool
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess

PARAMS = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1))


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
    nodes: Any,
    tokenizer_base: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_rows(rows_of_talk())
    for name, value in (("_LEAST", 40), ("_MOST", 90), ("_DIGITS", 1)):
        monkeypatch.setattr(shards, name, value)
    preprocess(PARAMS, base=tokenizer_base, rows=folder, out=tmp_path / "one")
    monkeypatch.setattr(work, "_LITTLE", 0)
    monkeypatch.setenv(ADDRESS, nodes.address)
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
def test_a_node_with_other_code_or_libraries_is_refused(
    nodes: Any, tokenizer_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "code_digest", lambda: "older")
    monkeypatch.setattr(cluster, "versions", lambda: {**shards.versions(), "tokenizers": "0.1"})
    pool = cluster_pool(nodes.address, PARAMS, open_base(tokenizer_base, weights=False))
    try:
        with pytest.raises(RegraftError, match="it has other regraft, tokenizers than the machine that asks"):
            pool.submit(print).result()
    finally:
        pool.shutdown()
