"""Sentencepiece tokenizers in GGUF: the ids of transformers, proved where llama.cpp is installed, refused where they would differ."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pieces
import pytest
import small

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.export.certificate import verify_export
from regraft.export.gguf import MODEL, write_gguf
from regraft.export.sentencepiece import TEMPLATE_SPACE
from regraft.export.tokens import compare
from regraft.export.vocabulary import open_tokenizer, read_vocabulary


def written(tmp_path: Path, family: str, kind: str | None = None, **more: Any) -> tuple[Path, Any, Any]:
    """A GGUF file, the tokenizer that it was made of, and what was made of it."""
    pytest.importorskip("gguf")
    base = pieces.make_base(tmp_path / "base", family, kind, **more)
    (tmp_path / "out").mkdir()
    write_gguf(base, tmp_path / "out", "gguf-f16")
    tokenizer = open_tokenizer(base)
    return tmp_path / "out" / MODEL, tokenizer, read_vocabulary(tokenizer, len(tokenizer) + 3)


@pytest.mark.parametrize("family", pieces.TEMPLATES)
def test_what_is_written_gives_the_ids_of_transformers_by_llama_cpps_rules(tmp_path: Path, family: str) -> None:
    file, tokenizer, vocabulary = written(tmp_path, family)

    spm = pieces.Spm(file)

    assert compare(spm.split, tokenizer, vocabulary) > 300
    talk = [
        {"role": "user", "content": "where is my  lamp\n🙂 über"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    template = spm.fields["tokenizer.chat_template"]
    lead = " " if template.startswith(TEMPLATE_SPACE) else ""
    assert template.removeprefix(TEMPLATE_SPACE) == tokenizer.chat_template
    assert spm.split(lead + text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("family", "first", "lead", "bos"),
    [
        ("llama", False, "", True),
        ("mistral", True, "", True),
        ("tinyllama", False, TEMPLATE_SPACE, False),
        ("zephyr", True, "", False),
        ("gemma", False, "", True),
    ],
)
def test_spaces_and_the_first_token_are_as_rendered_conversations_have_them(
    tmp_path: Path, family: str, first: bool, lead: str, bos: bool
) -> None:
    file, tokenizer, _ = written(tmp_path, family)

    fields = pieces.Spm(file).fields

    assert fields["tokenizer.ggml.add_space_prefix"] is first
    assert fields["tokenizer.chat_template"] == lead + tokenizer.chat_template
    assert fields["tokenizer.ggml.add_bos_token"] is bos
    assert fields["tokenizer.ggml.add_eos_token"] is False
    names = ("bos_token_id", "eos_token_id", "unk_token_id")
    written_ids = [fields[f"tokenizer.ggml.{names_.replace('unk_', 'unknown_')}"] for names_ in names]
    assert written_ids == [getattr(tokenizer, name) for name in names]


def test_kinds_of_tokens_are_told_apart(tmp_path: Path) -> None:
    file, tokenizer, _ = written(tmp_path, "gemma")

    spm = pieces.Spm(file)
    kinds = {text: spm.kinds[number] for text, number in spm.ids.items()}

    told = {"<unk>": 2, "<bos>": 3, "<end_of_turn>": 3, "\n\n": 4, "<0x09>": 6, "▁▁": 1, "▁is": 1}
    assert {text: kinds[text] for text in told} == told
    assert spm.kinds.count(6) == 256
    assert spm.tokens[len(tokenizer) :] == [f"[PAD{len(tokenizer) + i}]" for i in range(3)]
    assert spm.kinds[len(tokenizer) :] == [5, 5, 5]
    merged = [spm.scores[spm.ids[text]] for text in ("▁▁", "▁▁▁", "▁is", "\n\n")]
    assert merged == sorted(merged, reverse=True)  # as early as merged; what no merge makes comes last


def test_without_scores_every_text_is_split_otherwise_and_that_is_found(tmp_path: Path) -> None:
    file, tokenizer, vocabulary = written(tmp_path, "llama")
    spm = pieces.Spm(file)
    spm.scores = [-1000.0] * len(spm.scores)  # what llama.cpp's own converter writes for a tokenizer.json

    with pytest.raises(DamagedArtifact, match=r"splits \d+ of \d+ texts otherwise than transformers"):
        compare(spm.split, tokenizer, vocabulary)


def test_a_space_too_many_is_found(tmp_path: Path) -> None:
    file, tokenizer, vocabulary = written(tmp_path, "llama")
    spm = pieces.Spm(file)
    spm.fields["tokenizer.ggml.add_space_prefix"] = True

    with pytest.raises(DamagedArtifact, match="otherwise than transformers"):
        compare(spm.split, tokenizer, vocabulary)


def _drop_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][::2]


def _lose_a_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<lost>"] = content["model"]["vocab"].pop("<0xE2>")


def _normalize(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFKC"}


def _keep_spaces(content: dict[str, Any]) -> None:
    content["normalizer"] = None


def _strip(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["rstrip"] = True


def _normalize_added(content: dict[str, Any]) -> None:
    content["added_tokens"][2]["normalized"] = True


def _digits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


def _words(content: dict[str, Any]) -> None:
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    vocabulary = content["model"]["vocab"]
    vocabulary["is▁"] = max(vocabulary.values()) + 1
    content["model"]["merges"].append(["is", "▁"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop_merges, r"\d+ tokens have parts that no merge names \(as '.+' and '.+'"),
        (_lose_a_byte, r"1 of 256 bytes have no token \(<0xE2>\)"),
        (_normalize, r"its normalizer \(NFKC\) changes more than spaces"),
        (_keep_spaces, "it leaves spaces as they are"),
        (_strip, "the added token '<s>' is rstrip"),
        (_normalize_added, "the added token '</s>' is normalized"),
        (_digits, r"its pre-tokenizer \(Digits\) splits text before it is merged"),
        (_words, r"it splits text into words, and 1 tokens reach over one \('is▁'\)"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    pytest.importorskip("gguf")
    base = pieces.make_base(tmp_path / "base", "zephyr")
    content = json.loads((base / "tokenizer.json").read_bytes())
    change(content)
    (base / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(ParamsError, match=said) as refusal:
        write_gguf(base, tmp_path, "gguf-f16")
    assert "convert_hf_to_gguf.py" in str(refusal.value.fix)
    assert not (tmp_path / MODEL).exists()


def test_what_structure_cannot_prove_needs_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    base = pieces.make_base(tmp_path / "base", "zephyr")
    content = json.loads((base / "tokenizer.json").read_bytes())
    merges = ["".join(pair) for pair in content["model"]["merges"]]
    first = next(at for at, text in enumerate(merges) if merges.count(text) > 1)
    content["model"]["merges"].append(content["model"]["merges"].pop(first))
    (base / "tokenizer.json").write_text(json.dumps(content))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find_spec(name))

    with pytest.raises(MissingInput, match=r"merges of 1 tokens stand apart.*llama-cpp-python is not installed"):
        write_gguf(base, tmp_path, "gguf-f16")


def test_unigram_with_bytes_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = pieces.make_base(tmp_path / "base", "zephyr")
    content = json.loads((base / "tokenizer.json").read_bytes())
    vocabulary = [[text, -1.0] for text in content["model"]["vocab"]]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": True}
    (base / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(ParamsError, match=r"is a Unigram .* llama\.cpp's has no byte fallback"):
        write_gguf(base, tmp_path, "gguf-f16")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8, head_dim 16"),
        ({"tie_word_embeddings": False}, "its output layer is not the embedding"),
        ({"layer_types": ["full_attention", "full_attention"]}, "not every 2th layer"),
    ],
)
def test_a_gemma_that_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    pytest.importorskip("gguf")
    base = pieces.make_base(tmp_path / "base", "gemma", **more)

    with pytest.raises(ParamsError, match=said):
        write_gguf(base, tmp_path, "gguf-f16")


@pytest.mark.service
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "llama"), ("mistral", "mistral"), ("gemma", "gemma"), ("gemma", "gemma2"), ("gemma", "gemma3_text")],
)
def test_llama_cpp_has_the_ids_and_the_logits_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    """Needs `make llama-cpp`. The tests' own reader must say the same as llama.cpp, or the tests above prove nothing."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from regraft.export.tokens import texts

    layers = 7 if kind == "gemma3_text" else 2
    file, tokenizer, vocabulary = written(tmp_path, family, kind, num_hidden_layers=layers)
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, n_threads=1, type_k=0, type_v=0, verbose=False)
    spm = pieces.Spm(file)
    said = [(text, list(model.tokenize(text.encode(), add_bos=False, special=True))) for text in texts(vocabulary)]

    assert [text for text, ids in said if spm.split(text) != ids] == []
    assert (
        compare(lambda text: list(model.tokenize(text.encode(), add_bos=False, special=True)), tokenizer, vocabulary)
        > 300
    )
    ids = torch.arange(10, 50)
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
        expected = own(ids[None]).logits[0]
    model.eval(ids.tolist())
    found = torch.from_numpy(np.array(model.scores[:40], dtype=np.float32))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.02)
    model.close()


@pytest.mark.service
@pytest.mark.parametrize("family", ["tinyllama", "mistral", "gemma"])
def test_an_export_with_a_sentencepiece_tokenizer_is_measured_by_llama_cpp(tmp_path: Path, family: str) -> None:
    """Needs `make llama-cpp`."""
    pytest.importorskip("llama_cpp")
    small.make_clone(tmp_path, family=family)

    report = small.export_here(
        tmp_path,
        attention="eager" if family == "gemma" else "sdpa",
        forms=["gguf-f16"],
        candidates=["dequantized"],
        **small.LAX,
    )

    certificate = verify_export(tmp_path / "data/exports" / report.folder)
    (form,) = certificate.forms
    assert "gguf" in certificate.environment
    assert form.parity is not None
    assert (form.parity.mean_kl or 1) < 1e-4
    assert form.parity.top1_agreement > 0.98


@pytest.mark.service
def test_a_tokenizer_model_of_sentencepieces_own_is_split_alike_by_all_three(tmp_path: Path) -> None:
    """Needs `make llama-cpp` and the package `sentencepiece`, which transformers wants for a tokenizer.model alone."""
    llama_cpp = pytest.importorskip("llama_cpp")
    trainer = pytest.importorskip("sentencepiece")
    root = Path(__file__).parents[2]
    lines = [
        line for file in sorted((root / "regraft").glob("**/*.py")) for line in file.read_text().splitlines() if line
    ]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    trainer.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "made"), vocab_size=3000, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    base = tmp_path / "base"
    small.make_model("llama", base, dtype="float32", vocab_size=3000, hidden_size=64, head_dim=None)
    (base / "tokenizer.model").write_bytes((tmp_path / "made.model").read_bytes())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "chat_template": pieces.TURNS,
    }
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()

    write_gguf(base, tmp_path / "out", "gguf-f16")

    own, tokenizer = trainer.SentencePieceProcessor(str(tmp_path / "made.model")), open_tokenizer(base)
    model = llama_cpp.Llama(str(tmp_path / "out" / MODEL), vocab_only=True, verbose=False)
    ends = ("🙂", "é", "\t")
    texts = [line.lstrip() + " " * (i % 7) + ends[i % 3] for i, line in enumerate(lines[:3000])]
    for text in texts:
        ids = own.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert model.tokenize(f" {text}".encode(), add_bos=False, special=False) == ids
    model.close()
