"""What a process becomes that prepares shards for others."""

import gc
import os
from pathlib import Path

import pytest

from regraft.model.load import open_base
from regraft.preprocess import work
from regraft.preprocess.params import PreprocessParams


def test_a_worker_leaves_the_cores_to_the_others_and_keeps_only_what_it_is_given(
    tokenizer_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(work, "_inherited", {"preparer": "of another base"})
    before = gc.get_threshold()
    base, params = open_base(tokenizer_base, weights=False), PreprocessParams()
    try:
        work.become_worker(params, base, "a tokenizer")
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert gc.get_threshold()[0] == 200_000
    finally:
        gc.set_threshold(*before)
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    assert work._inherited == {"params": params, "base": base, "tokenizer": "a tokenizer"}
