"""Reading and writing safetensors in blocks."""

import math
from pathlib import Path

import pytest

from regraft.errors import DamagedArtifact, MissingInput
from regraft.export.tensors import Planned, Reader, Writer, aligned, catalogue, shards


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
    shapes = ((3,), (2, 5), (), (0, 4))
    wanted = {
        f"{dtype}.{len(shape)}.{sum(shape)}": (dtype, torch.arange(math.prod(shape)).reshape(shape).to(kind))
        for dtype, kind in kinds.items()
        for shape in shapes
    }
    plan = aligned([Planned(name, dtype, tuple(tensor.shape)) for name, (dtype, tensor) in wanted.items()])

    with Writer(tmp_path / "model.safetensors", plan) as writer:
        for each in plan:
            writer.block(wanted[each.name][1])

    found = load_file(tmp_path / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    for name, (_, tensor) in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with Reader(tmp_path / "model.safetensors") as reader:
        assert all(torch.equal(reader.whole(name), tensor) for name, (_, tensor) in wanted.items())


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.safetensors"
    with Writer(path, [Planned("a", "F32", (100,))]) as writer:
        writer.block(torch.ones(100))

    with Reader(path) as reader:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(DamagedArtifact, match="ended while a was read"):
            reader.whole("a")


def test_a_tensor_that_stands_in_two_shards_is_refused(tmp_path: Path) -> None:
    import torch

    for number in (1, 2):
        with Writer(tmp_path / f"{number}.safetensors", [Planned("a", "F32", (1,))]) as writer:
            writer.block(torch.ones(1))
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(DamagedArtifact, match=r"a occurs in 1\.safetensors and in 2\.safetensors"):
        catalogue(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        shards(tmp_path)
