"""Shards prepared on a Ray cluster; see `regraft.cluster`.

A call is one shard: it reads its rows from `rows.parquet` and writes its entry of the cache, so both lie on a file system
that every node reaches at the same path. Rows need not travel, and shards are cut by their content, not by size.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.artifacts import digest_json
from regraft.cluster import ClusterPool, Given
from regraft.model.pin import TOKENIZER_FILES, digest_files
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.shards import code_digest, versions

if TYPE_CHECKING:
    from regraft.model.load import Base


def cluster_pool(address: str, params: PreprocessParams, base: "Base") -> ClusterPool:
    """Connect to a cluster whose processes prepare shards with these parameters.

    Raises:
        MissingInput: Ray is not installed.
        ServiceUnavailable: no cluster answers there.
    """
    here = replace(base, folder=base.folder.absolute(), extended=base.extended.absolute() if base.extended else None)
    return ClusterPool(
        address,
        Given((params, here), _ready, _made_of),
        piece="a shard",
        fix="give its nodes more memory, and run the same command again: what was prepared is kept",
    )


def _made_of(given: tuple[PreprocessParams, "Base"]) -> dict[str, str]:
    """What decides a shard's bytes besides rows and parameters: the code, the libraries, the tokenizer's files."""
    tokenizer = digest_json(digest_files(given[1].tokenizer, TOKENIZER_FILES))
    return {"regraft": code_digest(), **versions(), "tokenizer": tokenizer}


def _ready(given: tuple[PreprocessParams, "Base"]) -> None:
    from regraft.preprocess import work

    work.become_worker(*given)
