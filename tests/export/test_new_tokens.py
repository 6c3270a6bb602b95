"""Tokens that the base's tokenizer lacks, from the pinned base to the export: tokenised, trained, scored, merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.artifacts import commit_dir, digest_file, digest_json, read_json, write_json
from regraft.errors import DamagedArtifact, ParamsError
from regraft.layout import Layout
from regraft.model.params import ModelParams, Quantization
from regraft.train.params import TrainParams

NEW = ["<sku>", "<shelf>"]
OLD = 400
"""Rows of the tiny base's embedding."""
BITS32 = Quantization(bits=32)


def _base(folder: Path, *, tied: bool) -> Path:
    """A tiny base on the disk, its output layer its own where `tied` is false."""
    import tiny
    from transformers import AutoModelForCausalLM

    tiny.make_base(folder)
    if not tied:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = False
        import torch

        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
        model.save_pretrained(folder)
    return folder


def _pin(root: Path, *, tied: bool = True, tokens: list[str] = NEW) -> Layout:
    from regraft.model.pin import pin

    layout = Layout(root)
    params = ModelParams(base=str(_base(root / "base", tied=tied)), new_tokens=tokens)
    pin(params, corpus=root / "none", out=layout.stage("model"))
    return layout


def _write_data(layout: Layout) -> None:
    """Conversations whose answers hold new tokens, packed one to a block, and the same as a holdout."""
    from regraft.model.load import load_tokenizer, open_base

    base = open_base(layout.stage("model"))
    requests = [f"{request} <sku>" for request in small.REQUESTS]
    rows = small.conversations(load_tokenizer(base), requests, ("<sku>lamp", "<shelf>", "<shelf><sku>9"))
    blocks = [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "position_ids": list(range(len(row["input_ids"]))),
        }
        for row in rows
    ]
    with commit_dir(layout.stage("preprocess")) as out:
        small.write_rows(out / "holdout-00000.arrow", rows)
        small.write_rows(out / "train-00000.arrow", blocks)
        digests = {"train_digest": digest_file(out / "train-00000.arrow")}
        write_json(
            out / "report.json", {"schema_version": 1, "tokenizer_digest": base.report.tokenizer_digest, **digests}
        )


def _train(layout: Layout, quantization: Quantization, **changes: Any) -> Any:
    from regraft.train.trainer import train

    params = {"max_steps": 40, "batch_size": 8, "rank": 4, "alpha": 8, "learning_rate": 2e-2, "threads": 1, **changes}
    return train(
        TrainParams.model_validate(params),
        ModelParams(quantization=quantization),
        base=layout.stage("model"),
        dataset=layout.stage("preprocess"),
        out=layout.stage("train"),
        checkpoints=layout.checkpoints,
    )


def _logits(layout: Layout, quantization: Quantization, ids: list[int]) -> Any:
    import torch

    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base

    base = load_model(open_base(layout.stage("model")), quantization, training=False)
    with torch.no_grad():
        return load_adapter(base, layout.stage("train") / "adapter")(input_ids=torch.tensor([ids])).logits


def test_a_new_token_is_one_token_everywhere_and_changes_the_tokenizers_digest(tmp_path: Path) -> None:
    from regraft.chat import render
    from regraft.model.load import load_tokenizer, open_base

    layout, plain = _pin(tmp_path / "new"), _pin(tmp_path / "plain", tokens=[])
    base, before = open_base(layout.stage("model")), open_base(plain.stage("model"))
    assert base.new_tokens == {"<sku>": OLD, "<shelf>": OLD + 1}
    assert (base.report.digest, before.new_tokens) == (before.report.digest, {})
    assert base.report.tokenizer_digest != before.report.tokenizer_digest
    assert "new_tokens" not in read_json(plain.stage("model") / "report.json")
    tokenizer = load_tokenizer(base)
    messages = [{"role": "user", "content": "where is <sku>"}, {"role": "assistant", "content": "<shelf>9"}]
    ids, labels = render(tokenizer, messages)
    assert (ids.count(OLD), ids.count(OLD + 1), labels.count(OLD + 1)) == (1, 1, 1)
    assert tokenizer.decode(ids).count("<sku>") == 1


def test_a_token_that_the_tokenizer_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"tokenizer has '<\|im_end\|>' already"):
        _pin(tmp_path, tokens=["<sku>", "<|im_end|>"])


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [" <a>"]])
def test_tokens_are_given_once_and_without_blanks_around(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="new_tokens"):
        ModelParams(new_tokens=tokens)


def test_an_altered_extended_tokenizer_is_refused(tmp_path: Path) -> None:
    from regraft.errors import PinMismatch
    from regraft.model.load import open_base

    layout = _pin(tmp_path)
    file = layout.stage("model") / "tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("<shelf>", "<other>"))
    with pytest.raises(PinMismatch, match="the tokenizer in"):
        open_base(layout.stage("model"), weights=False)


def test_a_new_row_is_the_mean_of_the_old_ones_and_rows_to_spare_are_used_first(tmp_path: Path) -> None:
    import torch

    from regraft.model.load import load_model, open_base
    from regraft.model.tokens import make_room

    model = load_model(open_base(_pin(tmp_path, tied=False).stage("model")), BITS32, training=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert weight.shape[0] == OLD + 2
        torch.testing.assert_close(weight[OLD:], weight[:OLD].mean(dim=0).repeat(2, 1))
        assert not weight.requires_grad
    make_room(model, {"<x>": 7})
    assert model.get_input_embeddings().weight.shape[0] == OLD + 2


@pytest.mark.parametrize(
    ("tied", "quantization"),
    [(True, Quantization()), (False, BITS32), (False, Quantization(compute_dtype="bf16"))],
    ids=["tied, nf4", "untied, 32 bits", "untied, nf4 beside bf16"],
)
def test_new_tokens_are_trained_saved_with_their_tokenizer_and_loaded_again(
    tmp_path: Path, tied: bool, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    from regraft.train.adapt import Trainee

    layout = _pin(tmp_path, tied=tied)
    _write_data(layout)
    said: list[Any] = []
    ids = [5, 6, OLD, 7, OLD + 1, 8]
    save = Trainee.save

    def spy(self: Trainee, *args: Any, **kwargs: Any) -> str:
        self.model.eval()
        with torch.no_grad():
            said.append(self.model(input_ids=torch.tensor([ids])).logits)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainee, "save", spy)
    report = _train(layout, quantization)

    adapter = layout.stage("train") / "adapter"
    rows = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "trainable_tokens" in k}
    ends = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert [name.removeprefix("base_model.model.").partition(".token_adapter")[0] for name in sorted(rows)] == ends
    assert all(each.shape == (2, 64) for each in rows.values())
    assert set(report.trained_whole) == set(rows)
    assert report.loss_last < report.loss_first / 2
    own = layout.stage("model") / "tokenizer"
    assert {p.name: p.read_bytes() for p in own.iterdir()}.items() <= {
        p.name: p.read_bytes() for p in adapter.iterdir()
    }.items()
    tolerance = 1e-4 if quantization.compute_dtype == "auto" else 0.1
    found = _logits(layout, quantization, ids).float()
    torch.testing.assert_close(found, said[0].float(), rtol=tolerance, atol=tolerance)


def test_a_base_without_the_tokens_refuses_the_adapter(tmp_path: Path) -> None:
    from regraft.model.adapter import load_adapter
    from regraft.model.load import load_model, open_base

    layout = _pin(tmp_path / "new")
    _write_data(layout)
    _train(layout, BITS32, max_steps=3)
    plain = _pin(tmp_path / "plain", tokens=[])
    model = load_model(open_base(plain.stage("model")), BITS32, training=False)
    with pytest.raises(DamagedArtifact, match=r"an embedding for the token 401, the base 400 rows"):
        load_adapter(model, layout.stage("train") / "adapter")


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.extended)], ids=["tied", "untied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A clone with an adapter that answers with new tokens, on an NF4 base."""
    layout = _pin(tmp_path_factory.mktemp("tokens"), tied=request.param)
    _write_data(layout)
    _train(layout, Quantization(), max_steps=150)
    return layout


def test_evaluation_scores_answers_with_new_tokens(trained: Layout, tmp_path: Path) -> None:
    from regraft.evaluate.evaluate import evaluate
    from regraft.evaluate.params import EvaluateParams

    report = evaluate(
        EvaluateParams(max_new_tokens=8, threads=1),
        Quantization(),
        base=trained.stage("model"),
        dataset=trained.stage("preprocess"),
        adapters={"one": trained.stage("train") / "adapter"},
        out=tmp_path / "scores",
    )
    loss = {name: report.scores[name].overall.loss for name in ("base", "one")}
    assert (loss["one"] or 9) < (loss["base"] or 0) / 3


@pytest.fixture
def export_it(trained: Layout, tmp_path: Path) -> Callable[..., Any]:
    """Export a copy of the trained clone."""

    def run(**changed: Any) -> tuple[Any, Path]:
        from regraft.model.adapter import adapter_digest
        from regraft.model.load import open_base

        root = Path(shutil.copytree(trained.root, tmp_path / "clone"))
        layout, base = Layout(root), open_base(trained.stage("model")).report
        parts = {"adapter": adapter_digest(layout.stage("train") / "adapter"), "base": base.digest}
        parts |= {"tokenizer": base.tokenizer_digest, "data": "d" * 64, "params": "e" * 64}
        data = {"validated": {"rows": 5}, "processed": {"train_digest": "d" * 64}}
        write_json(root / "lineage.json", {"identity": {"digest": digest_json(parts), **parts}, "data": data})
        return small.export_here(root, **changed), root / "data/exports/latest"

    return run


def test_the_export_has_rows_and_a_tokenizer_for_new_tokens_and_answers_as_the_adapter_does(
    trained: Layout, export_it: Callable[..., Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, folder = export_it(forms=["adapter", "nf4"])
    assert report.parity.top1_agreement > 0.95
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == OLD + 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(NEW) == [OLD, OLD + 1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [5, 6, OLD, 7, OLD + 1, 8]
    with torch.no_grad():
        merged = model(input_ids=torch.tensor([ids])).logits.float()
    ours = _logits(trained, Quantization(), ids).float()
    assert float((merged - ours).norm() / ours.norm()) < 0.05
    assert (merged.argmax(-1) == ours.argmax(-1)).float().mean() > 0.8
    forms = {p.parent.name: p for p in folder.resolve().rglob("tokenizer.json")}
    assert len(forms) >= 3  # the merged weights', the adapter's and the checkpoint's in 4 bits


def test_a_merge_by_itself_takes_the_tokenizer_that_lies_beside_the_adapter(trained: Layout, tmp_path: Path) -> None:
    from regraft.export.standalone import merge_adapter

    record = merge_adapter(trained.root / "base", trained.stage("train") / "adapter", tmp_path / "merged")
    assert record.vocabulary == OLD + 2
    tokenizers = [folder / "tokenizer.json" for folder in (trained.stage("model") / "tokenizer", tmp_path / "merged")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    merged = small.tensors(tmp_path / "merged")
    rows = small.tensors(trained.stage("train") / "adapter")
    for name, tensor in rows.items():
        if "trainable_tokens" in name:
            weight = name.removeprefix("base_model.model.").partition(".token_adapter")[0] + ".weight"
            assert merged[weight].shape[0] == OLD + 2
            assert (merged[weight][OLD:] == tensor.to(merged[weight].dtype)).all()


def test_a_gguf_file_of_a_merge_with_new_tokens_reads_them_back_with_their_rows(
    trained: Layout, tmp_path: Path
) -> None:
    """By transformers, an independent reader; for llama.cpp, plain tokens that a text may hold are USER_DEFINED ones."""
    gguf = pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.export.gguf import write_gguf
    from regraft.export.standalone import merge_adapter

    merged, out = tmp_path / "merged", tmp_path / "out"
    merge_adapter(trained.root / "base", trained.stage("train") / "adapter", merged)
    out.mkdir()

    write_gguf(merged, out, "gguf-f16")

    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[OLD:] == NEW
    assert fields["tokenizer.ggml.token_type"].contents()[OLD:] == [gguf.TokenType.USER_DEFINED] * 2
    found = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([[5, 6, OLD, 7, OLD + 1, 8]])
    with torch.no_grad():
        expected, logits = small.load(merged).float()(ids).logits, found(ids).logits
    assert logits.shape[-1] == OLD + 2
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.01)
    own, tokenizer = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    for text in ("my <sku>lamp<shelf> and<sku><shelf>9", "<sku>", " <shelf> ", "<sk>u>"):
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
        assert tokenizer.decode(own(text)["input_ids"]) == text


def test_new_tokens_that_leave_a_gap_after_the_base_are_not_merged(trained: Layout, tmp_path: Path) -> None:
    from regraft.export.plan import plan_merge

    adapter = Path(shutil.copytree(trained.stage("train") / "adapter", tmp_path / "adapter"))
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(OLD + 1), str(OLD + 2)))
    with pytest.raises(DamagedArtifact, match="leave rows after 400 without values"):
        plan_merge(trained.root / "base", adapter, "own")
