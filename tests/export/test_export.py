"""The whole export: a command, a fresh process, a verified folder, and what must not be published."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small

from regraft.artifacts import hold, read_json
from regraft.cli import run
from regraft.errors import Busy, DamagedArtifact, GateRefused, PinMismatch, RegraftError
from regraft.export import export as module
from regraft.export.certificate import verify_export
from regraft.export.report import ExportReport
from regraft.layout import Layout

POINTS = (
    "export.shard",
    "export.shard@2",
    "export.merge",
    "export.merge@2",
    "export.merged",
    "export.verify",
    "export.verified",
    "export.publish",
    "commit_dir.sealed@3",
    "export.latest",
)


def test_an_export_holds_weights_tokenizer_card_certificate_and_sums_and_nothing_else(exported: Any) -> None:
    assert sorted(small.contents(exported.exports)) == sorted(
        [
            "latest",
            *(
                f"{exported.identity[:16]}/{name}"
                for name in (
                    *("LICENSE", "README.md", "SHA256SUMS", "certificate.json", "chat_template.jinja", "config.json"),
                    *("generation_config.json", "lineage.json", "manifest.json", "model.safetensors"),
                    *("tokenizer.json", "tokenizer_config.json"),
                )
            ),
        ]
    )
    assert (exported.exports / "latest").readlink() == Path(exported.identity[:16])


def test_sha256sum_checks_every_file_of_an_export(exported: Any) -> None:
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=exported.folder, capture_output=True, text=True, check=False
    )

    files = {path.name for path in exported.folder.iterdir()} - {"SHA256SUMS", "manifest.json"}
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in files)


def test_the_command_verify_checks_an_export_offline(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(exported.folder)]) == 0
    assert f"is whole: version {exported.identity[:16]}" in capsys.readouterr().out


def test_the_certificate_says_layer_by_layer_what_is_left_of_the_change(exported: Any) -> None:
    certificate = verify_export(exported.folder)

    layers = {f"model.layers.{n}.{m}.weight" for n in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj")}
    layers |= {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    for candidate in certificate.candidates:
        assert {each.name for each in candidate.survival} == layers
        assert all(each.cosine > 0.999 and abs(each.norm - 1) < 0.01 for each in candidate.survival)
    assert "delta_survival" in {check.name for check in certificate.verdict.checks}
    assert "| delta survival |" in (exported.folder / "README.md").read_text()


def test_the_report_of_the_command_says_what_the_certificate_says(exported: Any) -> None:
    report = ExportReport.load(Layout(exported.root).stage("export") / "report.json")
    certificate = verify_export(exported.folder)

    assert (report.identity, report.folder, report.already_exported) == (
        exported.identity,
        exported.identity[:16],
        False,
    )
    assert certificate.identity == exported.identity
    assert certificate.chosen == report.chosen == "dequantized"
    assert [each.source for each in certificate.candidates] == ["original", "dequantized"]
    parities = [each.parity for each in certificate.candidates if each.parity is not None]
    assert report.parity == parities[1]
    assert (parities[1].mean_kl or 1) < 1e-3 < (parities[0].mean_kl or 0)
    assert certificate.verdict.passed


def test_no_path_of_this_machine_is_published(exported: Any) -> None:
    for name, data in small.contents(exported.folder).items():
        assert str(exported.root).encode() not in data, name


def test_the_licence_of_the_base_goes_with_the_merged_weights(exported: Any) -> None:
    assert (exported.folder / "LICENSE").read_text() == "Do as you like.\n"
    assert "license: apache-2.0" in (exported.folder / "README.md").read_text().split("---")[1].splitlines()


def test_any_byte_that_is_flipped_in_an_export_is_found_offline(exported: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    assert verify_export(folder).identity == exported.identity

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(DamagedArtifact):
            verify_export(folder)
        path.write_bytes(data)


def test_a_certificate_that_was_altered_with_its_sums_still_does_not_verify(exported: Any, tmp_path: Path) -> None:
    from regraft.artifacts import seal_dir

    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    seal_dir(folder)

    with pytest.raises(DamagedArtifact, match=r"certificate\.json lists other .*; SHA256SUMS lists other"):
        verify_export(folder)


def test_the_same_export_again_makes_nothing_and_says_so(
    exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clone = exported.copy(tmp_path / "clone")
    monkeypatch.setattr(module, "plan_merge", forbidden)
    before = {path: path.stat().st_mtime_ns for path in clone.folder.rglob("*")}

    report = small.export_here(clone.root)

    assert report.already_exported
    assert {path: path.stat().st_mtime_ns for path in clone.folder.rglob("*")} == before


def test_the_export_of_a_version_that_is_not_the_champion_leaves_latest_and_the_champions_export(
    exported: Any, tmp_path: Path
) -> None:
    clone = exported.copy(tmp_path / "clone")
    params = clone.root / "params.yaml"
    params.write_text(params.read_text().replace("export: {", "export: {keep: 1, "))
    champion, old = clone.exports / ("a" * 16), clone.exports / ("b" * 16)
    for folder in (champion, old):
        folder.mkdir()
    (clone.exports / "latest").unlink()

    done = small.export_command(clone.root, clone.identity, "--no-latest", "--champion", "a" * 64)

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in clone.exports.iterdir() if not path.name.startswith(".")) == sorted(
        [champion.name, clone.folder.name]
    )


def test_a_damaged_export_is_made_again_with_the_same_bytes(exported: Any, tmp_path: Path) -> None:
    clone = exported.copy(tmp_path / "clone")
    (clone.folder / "model.safetensors").write_bytes(b"")

    assert not small.export_here(clone.root).already_exported
    assert small.contents(clone.exports) == small.contents(exported.exports)


def test_a_merge_that_lost_its_weights_is_refused_with_figures_and_the_last_export_stays(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    before = small.contents(clone.exports)
    monkeypatch.setattr(module, "merge", merge_of_zeros)

    with pytest.raises(
        GateRefused, match=r"at least 0\.95 is asked for.*at most 0\.001 is allowed.*the figures are in"
    ):
        small.export_here(clone.root, dtype="fp32")

    refusal = f"refused/{clone.identity[:16]}.json"
    after = small.contents(clone.exports)
    certificate = json.loads(after.pop(refusal))
    assert after == before
    assert certificate["verdict"]["passed"] is False
    assert certificate["candidates"][0]["parity"]["mean_kl"] > 0.001


def test_an_export_without_anything_measured_is_refused(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    monkeypatch.setattr(module, "write_companions", lambda *_, **__: None)

    with pytest.raises(GateRefused, match="No evidence: no merged model could be measured"):
        small.export_here(clone.root, dtype="fp32", candidates=["original"])


def test_a_disk_that_is_too_small_is_found_before_anything_is_merged(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    before = small.contents(clone.exports)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    monkeypatch.setattr(module, "merge", forbidden)

    with pytest.raises(RegraftError, match=r"the export needs 1\.[0-9] MB beside .*exports, 0\.1 MB are free"):
        small.export_here(clone.root, dtype="fp32")
    assert small.contents(clone.exports) == before


def test_a_disk_that_fills_up_in_the_merge_leaves_what_was_there(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    before = small.contents(clone.exports)
    monkeypatch.setenv("REGRAFT_FAILPOINT", "export.merge=ENOSPC")

    with pytest.raises(RegraftError, match="is full"):
        small.export_here(clone.root, dtype="fp32")
    assert small.contents(clone.exports) == before


def test_a_byte_flipped_in_the_base_is_found_before_anything_is_merged(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    report = json.loads((Layout(clone.root).stage("model") / "report.json").read_bytes())
    (Layout(clone.root).stage("model") / "report.json").write_text(
        json.dumps({**report, "path": str(clone.root / "base")})
    )
    flip(clone.root / "base/model.safetensors")
    monkeypatch.setattr(module, "plan_merge", forbidden)

    with pytest.raises(PinMismatch, match=r"digest [0-9a-f]{64}, pinned [0-9a-f]{64}.*model\.safetensors"):
        small.export_here(clone.root, dtype="fp32")


def test_a_byte_flipped_in_the_adapter_is_found_before_anything_is_merged(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    flip(clone.root / "data/work/train/adapter/adapter_model.safetensors")
    monkeypatch.setattr(module, "plan_merge", forbidden)

    with pytest.raises(PinMismatch, match=r"the adapter has the digest [0-9a-f]{64}, the lineage names [0-9a-f]{64}"):
        small.export_here(clone.root, dtype="fp32")


def test_a_lineage_of_another_version_is_refused(exported: Any, tmp_path: Path) -> None:
    clone = exported.copy(tmp_path / "clone")
    lineage = read_json(clone.root / "lineage.json")
    lineage["identity"]["data"] = "f" * 64
    (clone.root / "lineage.json").write_text(json.dumps(lineage))

    with pytest.raises(PinMismatch, match="the lineage is of version"):
        small.export_here(clone.root)


def test_two_exports_at_once_are_one_export_and_a_busy(exported: Any, tmp_path: Path) -> None:
    clone = exported.copy(tmp_path / "clone")

    with hold(clone.exports / ".work/lock", "a test"), pytest.raises(Busy, match="the export is busy"):
        small.export_here(clone.root)


def test_an_export_killed_before_its_pointer_moves_is_finished_by_the_next_one(exported: Any, tmp_path: Path) -> None:
    assert_kill_is_harmless(exported, tmp_path / "clone", "export.publish")


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_an_export_killed_anywhere_and_run_again_has_the_same_bytes(exported: Any, tmp_path: Path, point: str) -> None:
    assert_kill_is_harmless(exported, tmp_path / "clone", point)


def test_merging_loads_no_transformers(exported: Any, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from regraft.export.export import merge, plan_merge
from regraft.export.sources import dequantized
from regraft.model.params import Quantization
base, adapter, out = map(Path, sys.argv[1:])
plan = plan_merge(base, adapter, "bf16")
merge(plan, out, weights=dequantized(plan, Quantization(), None))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "peft", "mlflow", "prefect"}))
"""
    (tmp_path / "out").mkdir()
    arguments = [exported.root / "base", exported.root / "data/work/train/adapter", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


def assert_kill_is_harmless(exported: Any, root: Path, point: str) -> None:
    clone = exported.copy(root)
    shutil.rmtree(clone.exports)

    killed = small.export_command(clone.root, clone.identity, REGRAFT_FAILPOINT=point)
    assert killed.returncode != 0
    assert not (clone.exports / "latest").exists()

    again = small.export_command(clone.root, clone.identity)
    assert again.returncode == 0, again.stderr
    assert small.contents(clone.exports) == small.contents(exported.exports)


def merge_of_zeros(plan: Any, out: Path, **_: Any) -> None:
    from regraft.export.merge import merge
    from regraft.export.tensors import Reader

    def zeros(reader: Reader, name: str) -> Iterator[Any]:
        for first, block in reader.blocks(name):
            yield first, block * 0

    merge(plan, out, weights=zeros)


def forbidden(*_: Any) -> Any:
    raise AssertionError("nothing may be merged")


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-9, 2)
        byte = file.read(1)[0]
        file.seek(-9, 2)
        file.write(bytes([byte ^ 1]))
