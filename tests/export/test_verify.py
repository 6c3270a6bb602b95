"""The verification against folders that are not what they should be, and the measures that it takes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.artifacts import commit_dir
from regraft.errors import PinMismatch
from regraft.evaluate.params import EvaluateParams
from regraft.export.folder import write_companions
from regraft.export.merge import merge, plan_merge
from regraft.export.verify import Entrant, Job, verify
from regraft.layout import Layout
from regraft.model.params import Quantization


def job(exported: Any, tmp_path: Path, entrants: list[Entrant], bits: int = 16) -> Job:
    layout, lineage = Layout(exported.root), json.loads((exported.root / "lineage.json").read_bytes())
    return Job(
        base=layout.stage("model"),
        adapter=layout.stage("train") / "adapter",
        adapter_digest=lineage["identity"]["adapter"],
        dataset=layout.stage("preprocess"),
        quantization=Quantization(bits=bits),
        evaluate=EvaluateParams(max_new_tokens=8),
        rows=6,
        entrants=entrants,
        scratch=tmp_path,
        out=tmp_path / "scores.json",
    )


def make_candidate(exported: Any, folder: Path) -> Entrant:
    plan = plan_merge(exported.root / "base", Layout(exported.root).stage("train") / "adapter", "own")
    with commit_dir(folder) as temporary:
        merge(plan, temporary)
        write_companions(plan, temporary, dtype="own")
    return Entrant(source="original", folder=folder, assumed=None)


def rewrite(folder: Path, change: Any) -> None:
    """Change a candidate's tensors, with a manifest to match."""
    from safetensors.torch import load_file, save_file

    with commit_dir(folder) as temporary:
        for path in folder.iterdir():
            (temporary / path.name).write_bytes(path.read_bytes())
        tensors = load_file(temporary / "model.safetensors")
        change(tensors)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})


def zero(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()


def drop(tensors: dict[str, Any]) -> None:
    del tensors["model.norm.weight"]


def add(tensors: dict[str, Any]) -> None:
    tensors["model.foreign.weight"] = tensors["model.norm.weight"].clone()


def poison(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][0] = math.nan


def test_each_way_to_spoil_a_merged_file_shows(exported: Any, tmp_path: Path) -> None:
    entrants = [
        make_candidate(exported, tmp_path / name) for name in ("good", "flipped", "zeroed", "short", "long", "nan")
    ]
    with (tmp_path / "flipped/model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x7f")
    for name, change in (("zeroed", zero), ("short", drop), ("long", add), ("nan", poison)):
        rewrite(tmp_path / name, change)

    scores = verify(job(exported, tmp_path, entrants))
    good, flipped, zeroed, short, long, nan = scores.candidates

    assert good.error is None
    assert good.parity is not None
    assert good.parity.top1_agreement == 1.0
    assert good.parity.same_answers == 1.0
    assert (good.parity.mean_kl or 1) < 1e-6
    assert good.parity.positions == scores.reference.positions > 0
    assert "sha256 differs" in (flipped.error or "")
    assert zeroed.parity is not None
    assert (zeroed.parity.mean_kl or 0) > 100 * (good.parity.mean_kl or 0)
    assert "missing_keys: model.norm.weight" in (short.error or "")
    assert "unexpected_keys: model.foreign.weight" in (long.error or "")
    assert nan.parity is not None
    assert nan.parity.mean_kl is None


def test_a_wrong_guess_of_what_was_quantised_disqualifies_a_candidate(exported: Any, tmp_path: Path) -> None:
    entrant = make_candidate(exported, tmp_path / "candidate").model_copy(
        update={"assumed": ["model.layers.0.mlp.up_proj"]}
    )

    scores = verify(job(exported, tmp_path, [entrant], bits=4))

    assert len(scores.reference.quantized_modules) == 14
    assert "misjudged which layers were quantised: 0 were not (), 13 were missed" in (scores.candidates[0].error or "")


def test_an_adapter_that_changed_since_the_merge_is_refused(exported: Any, tmp_path: Path) -> None:
    changed = job(exported, tmp_path, []).model_copy(update={"adapter_digest": "0" * 64})

    with pytest.raises(PinMismatch, match=r"changed: its digest is [0-9a-f]{64}, it was 0000"):
        verify(changed)


def test_the_divergence_is_that_of_float64_and_identical_models_have_none(tmp_path: Path) -> None:
    import torch

    from regraft.export.parity import compare, keep_reference

    torch.manual_seed(0)
    mine, other = torch.log_softmax(torch.randn(7, 11), -1), torch.log_softmax(torch.randn(7, 11), -1)
    targets = torch.zeros(7, dtype=torch.long)

    def batches(chances: Any) -> Iterator[Any]:
        yield chances[:4], targets[:4]
        yield chances[4:], targets[4:]

    assert keep_reference(tmp_path / "reference", batches(mine)) == 7
    same, different = (compare(tmp_path / "reference", batches(each)) for each in (mine, other))

    expected = (mine.double().exp() * (mine.double() - other.double())).sum(-1)
    assert (same.positions, same.top1_agreement, same.mean_kl, same.max_kl) == (7, 1.0, 0.0, 0.0)
    assert different.mean_kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert different.max_kl == pytest.approx(float(expected.max()), rel=1e-5)
    assert different.top1_agreement == float((mine.argmax(-1) == other.argmax(-1)).double().mean())


def test_every_trained_token_is_compared_whatever_the_batches(exported: Any) -> None:
    import torch

    from regraft.evaluate.holdout import read_holdout
    from regraft.export.parity import log_probabilities

    rows = read_holdout(Layout(exported.root).stage("preprocess"), None).rows
    model = small.load(exported.folder).float().eval()
    trained = sum(label != -100 for row in rows for label in row.labels)

    one = list(log_probabilities(model, rows, EvaluateParams(batch_size=1)))
    all_ = list(log_probabilities(model, rows, EvaluateParams(batch_size=64)))

    assert len(one) == len(rows)
    assert len(all_) == 1
    assert sum(len(targets) for _, targets in one) == len(all_[0][1]) == trained
    assert torch.equal(torch.cat([targets for _, targets in one]), all_[0][1])
    torch.testing.assert_close(torch.cat([chances for chances, _ in one]), all_[0][0], atol=1e-5, rtol=1e-5)
