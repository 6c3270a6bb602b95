"""Other forms of a merged model: made, loaded from disk, measured, and refused where the change is lost."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import small

from regraft.errors import GateRefused, MissingInput, ParamsError
from regraft.evaluate.params import EvaluateParams
from regraft.export.certificate import verify_export
from regraft.export.gguf import modelfile, write_gguf
from regraft.export.survival import overall
from regraft.layout import Layout


@pytest.mark.extended
def test_forms_are_published_beside_the_weights_each_loaded_and_measured(exported: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    clone = exported.copy(tmp_path / "clone")

    report = small.export_here(clone.root, forms=["adapter", "nf4", "int8"], **small.LAX)

    folder = clone.exports / report.folder
    certificate = verify_export(folder)
    assert [each.form for each in certificate.forms] == ["adapter", "nf4", "int8"]
    assert all(each.parity is not None and each.error is None for each in certificate.forms)
    bare, nf4, int8 = certificate.forms
    assert bare.parity is not None
    assert (bare.parity.mean_kl, bare.parity.same_answers) == (0.0, 1.0)
    assert 0.8 < (overall(nf4.survival) or 0) < (overall(int8.survival) or 0) < 1
    assert {each.name for each in nf4.survival} == {each.name for each in certificate.candidates[0].survival}
    assert {name.partition("/")[0] for name in certificate.files if "/" in name} == {"adapter", "nf4", "int8"}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "nf4", dtype="auto")
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    with small.quiet():
        PeftModel.from_pretrained(small.load(clone.root / "base"), folder / "adapter")


def test_a_requantised_merge_that_loses_a_change_of_one_percent_is_refused_layer_by_layer(tmp_path: Path) -> None:
    small.make_clone(tmp_path, size=0.016)

    with pytest.raises(GateRefused, match=r"least left in model\.layers\.\d\.\S+: cosine 0?-?\.?\d") as refusal:
        small.export_here(tmp_path, forms=["nf4"], candidates=["dequantized"], **small.LAX)

    (file,) = (tmp_path / "data/exports/refused").iterdir()
    certificate = json.loads(file.read_bytes())
    merged, form = certificate["candidates"][0]["survival"], certificate["forms"][0]["survival"]
    assert [check["name"] for check in certificate["verdict"]["checks"] if not check["passed"]] == [
        "nf4.delta_survival"
    ]
    assert all(0.005 < each["relative"] < 0.02 and each["cosine"] > 0.95 for each in merged)
    assert all(abs(each["cosine"]) < 0.4 for each in form)
    assert "nf4.delta_survival" in str(certificate["verdict"]["checks"])
    assert not (tmp_path / "data/exports/latest").exists()
    assert "Nothing was published" in str(refusal.value)


def test_a_change_of_one_percent_in_the_dequantised_base_counts_as_kept_in_int8(tmp_path: Path) -> None:
    """Beside the original weights, which are ten times such a change away, it would look lost."""
    small.make_clone(tmp_path, size=0.016)

    report = small.export_here(tmp_path, forms=["int8"], candidates=["dequantized"], **small.LAX)

    (form,) = verify_export(tmp_path / "data/exports" / report.folder).forms
    assert all(0.005 < each.relative < 0.02 for each in form.survival)
    assert (overall(form.survival) or 0) > 0.65


def test_an_architecture_or_a_tokenizer_that_gguf_does_not_know_is_refused(exported: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = json.loads((exported.folder / "config.json").read_bytes())
    merged = tmp_path / "merged"
    merged.mkdir()
    for path in exported.folder.iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    (merged / "config.json").write_text(json.dumps({**config, "model_type": "novelty"}))
    with pytest.raises(ParamsError, match="this is novelty"):
        write_gguf(merged, tmp_path, "gguf-f16")

    (merged / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((merged / "tokenizer.json").read_bytes())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ParamsError, match="splits text in a way unknown here"):
        write_gguf(merged, tmp_path, "gguf-f16")


def test_gguf_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingInput, match="the package gguf is not installed") as refusal:
        write_gguf(tmp_path, tmp_path, "gguf-f16")
    assert "regraft[gguf]" in str(refusal.value)


def test_a_modelfile_stops_at_the_models_end_tokens() -> None:
    assert modelfile({2: '<|im_"end|>', 3: "<|x|>"}, {"eos_token_id": 2}) == (
        'FROM ./model.gguf\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\nPARAMETER stop "<|im_\\"end|>"\n'
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_file_read_back_by_transformers_has_the_logits_and_token_ids_of_the_merged_model(
    tmp_path: Path, kind: str
) -> None:
    """An independent reader of the format; what llama.cpp makes of it is the next test's matter."""
    pytest.importorskip("gguf")
    import tiny
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = tiny.make_base(tmp_path / "llama")
    if kind == "qwen2":
        tokens = len(AutoTokenizer.from_pretrained(merged))
        other = small.make_model(
            "qwen2", tmp_path / "qwen2", dtype="float32", vocab_size=tokens, hidden_size=64, head_dim=None
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (other / name).write_bytes((merged / name).read_bytes())
        merged = other
    (tmp_path / "out").mkdir()

    write_gguf(merged, tmp_path / "out", "gguf-f16")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, logits = small.load(merged).float()(ids).logits, found(ids).logits
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.01)
    own = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": "where is my lamp?"}]
    text = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text


@pytest.mark.service
def test_llama_cpp_reads_what_was_exported_as_transformers_does(exported: Any, tmp_path: Path) -> None:
    """Needs the extra `gguf` and `make llama-cpp`, which compiles for minutes, once."""
    pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.evaluate.holdout import read_holdout
    from regraft.evaluate.score import answer_rows, stop_tokens
    from regraft.export.llama import LlamaCpp

    clone = exported.copy(tmp_path / "clone")
    report = small.export_here(clone.root, forms=["gguf-f16", "gguf-q8_0"], **small.LAX)
    folder = clone.exports / report.folder
    half, eighth = verify_export(folder).forms
    assert half.parity is not None
    assert eighth.parity is not None
    assert (half.parity.mean_kl or 1) < 1e-3
    assert (eighth.parity.mean_kl or 1) < 0.1
    assert half.parity.top1_agreement > 0.98
    assert eighth.parity.top1_agreement > 0.9

    params = EvaluateParams(max_new_tokens=16, threads=1)
    rows = read_holdout(Layout(clone.root).stage("preprocess"), 100).rows
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = LlamaCpp(folder / "gguf-f16", rows, params)
    assert llama.check_tokens(rows, tokenizer) == len(rows)
    mine = answer_rows(model, tokenizer, rows, params, "transformers")
    theirs = llama.answers(rows, tokenizer, stop_tokens(model, tokenizer), params)
    assert [each.generated for each in theirs] == [each.generated for each in mine]


@pytest.mark.service
def test_llama_cpp_makes_q4_k_m_of_what_was_exported_and_stays_near_it(tmp_path: Path) -> None:
    """Needs the extra `gguf` and `make llama-cpp`; K-quants have blocks of 256 weights, so the model is that wide."""
    pytest.importorskip("llama_cpp")
    import gguf
    import tiny
    import torch
    from transformers import AutoModelForCausalLM

    merged = tiny.make_base(tmp_path / "merged", hidden=256)
    (tmp_path / "out").mkdir()

    write_gguf(merged, tmp_path / "out", "gguf-q4_k_m")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    tensors = gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
    assert {"Q4_K", "Q6_K", "F32"} == {each.tensor_type.name for each in tensors}
    ids = torch.arange(1, 40)  # 0 pads: its embedding is zero
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids[None]).logits[0]
    llama = llama_cpp_scores(tmp_path / "out/model.gguf", ids.tolist())
    agreement = (llama.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.3  # random weights, all tokens alike, at 4.5 bits; a wrong layout agrees in one of 500
    assert torch.cosine_similarity(llama, expected, dim=-1).min() > 0.8


def llama_cpp_scores(path: Path, ids: list[int]) -> Any:
    import numpy as np
    import torch
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float32))


def test_q4_k_m_of_a_model_that_its_blocks_do_not_fit_is_refused(tmp_path: Path) -> None:
    import tiny

    merged = tiny.make_base(tmp_path / "merged")
    (tmp_path / "out").mkdir()

    with pytest.raises(ParamsError, match="widths that 256 divides, the model has 64, 128"):
        write_gguf(merged, tmp_path / "out", "gguf-q4_k_m")


def test_q4_k_m_without_llama_cpp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    import tiny

    merged = tiny.make_base(tmp_path / "merged", hidden=256)
    (tmp_path / "out").mkdir()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)

    with pytest.raises(MissingInput, match=r"only llama\.cpp makes Q4_K_M"):
        write_gguf(merged, tmp_path / "out", "gguf-q4_k_m")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_gguf_form_is_refused_where_llama_cpp_cannot_say_how_it_reads_it(tmp_path: Path) -> None:
    from regraft.export.llama import LlamaCpp

    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed")
    with pytest.raises(MissingInput, match="llama-cpp-python is not installed"):
        LlamaCpp(tmp_path, [], EvaluateParams())
