import json
import shutil
from pathlib import Path

import pytest

from regraft.artifacts import verify_dir
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, ServiceUnavailable
from regraft.model.params import ModelParams
from regraft.model.pin import pin
from regraft.model.report import BaseReport

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "my-llama"))


def _pin(base: Path | str, out: Path, **params: str) -> BaseReport:
    return pin(ModelParams(base=str(base), **params), corpus=out / "no corpus", out=out)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_local_folder_is_pinned_by_the_digests_of_its_files(folder: Path, tmp_path: Path) -> None:
    report = _pin(folder, tmp_path / "model")

    assert report == BaseReport.load(tmp_path / "model/report.json")
    assert (report.source, report.name, report.path) == ("folder", "my-llama", str(folder))
    assert (report.parameters, report.dtype, report.architecture) == (99648, "float32", "LlamaForCausalLM")
    assert sorted(report.files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["manifest.json", "report.json"]


def test_pinning_twice_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    _pin(folder, tmp_path / "one")
    _pin(folder, tmp_path / "two")

    assert verify_dir(tmp_path / "one") == verify_dir(tmp_path / "two")


def test_the_chat_template_counts_for_the_tokenizer_and_not_for_the_base(folder: Path, tmp_path: Path) -> None:
    before = _pin(folder, tmp_path / "before")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    after = _pin(folder, tmp_path / "after")

    assert before.digest == after.digest
    assert before.tokenizer_digest != after.tokenizer_digest


def test_the_stand_in_is_made_inside_the_output(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some words")
    monkeypatch.setattr(
        "regraft.model.standin.make_standin", lambda text, out, params: shutil.copytree(tiny_base, out) and None
    )

    report = pin(ModelParams(), corpus=corpus, out=tmp_path / "model")

    assert (report.source, report.name) == ("standin", "standin")
    assert (tmp_path / "model/weights/model.safetensors").is_file()
    verify_dir(tmp_path / "model")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(DamagedArtifact, match=r"pickled weights \(pytorch_model\.bin\)"):
        _pin(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_configuration_that_names_code_is_refused(folder: Path, tmp_path: Path, file: str) -> None:
    _edit(folder / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})

    with pytest.raises(DamagedArtifact, match=rf"{file} names code of its own \(auto_map\)"):
        _pin(folder, tmp_path / "model")


def test_a_base_that_is_quantised_already_is_refused(folder: Path, tmp_path: Path) -> None:
    _edit(folder / "config.json", quantization_config={"load_in_4bit": True})

    with pytest.raises(DamagedArtifact, match="quantised already"):
        _pin(folder, tmp_path / "model")


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2-of-2.safetensors"}}))

    with pytest.raises(MissingInput, match=r"lacks model-2-of-2\.safetensors"):
        _pin(folder, tmp_path / "model")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    (folder / file).unlink()

    with pytest.raises(MissingInput, match=r"config\.json|tokenizer\.json|safetensors"):
        _pin(folder, tmp_path / "model")


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_model(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="there is no folder"):
        _pin(tmp_path / "nowhere", tmp_path / "model")


def test_a_hub_model_needs_a_commit(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"needs model\.revision"):
        _pin("some/model", tmp_path / "model")


def test_a_revision_of_a_folder_is_a_mistake(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"model\.revision"):
        _pin(folder, tmp_path / "model", revision=REVISION)


def test_a_hub_model_is_fetched_at_its_commit_without_code_or_pickles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def snapshot_download(repo: str, **wanted: object) -> str:
        asked.update(wanted, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    report = _pin("some/model", tmp_path / "model", revision=REVISION)

    assert (report.source, report.name, report.path, report.revision) == ("hub", "some/model", None, REVISION)
    assert (asked["repo"], asked["revision"]) == ("some/model", REVISION)
    assert not [pattern for pattern in asked["allow_patterns"] if "py" in pattern or "bin" in pattern or pattern == "*"]


def test_a_hub_that_does_not_answer_is_said_with_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="the hub was not reached"):  # the tests run with HF_HUB_OFFLINE=1
        _pin("some/model", tmp_path / "model", revision=REVISION)
