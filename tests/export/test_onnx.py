"""ONNX: what onnxruntime-genai makes of a merged model is what transformers makes of it, or it is refused by name."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pieces
import pytest
import small

from regraft.errors import DamagedArtifact, GateRefused, MissingInput, ParamsError, RegraftError
from regraft.evaluate.holdout import HeldOutRow
from regraft.evaluate.params import EvaluateParams
from regraft.export.certificate import verify_export
from regraft.export.formats import _in_blocks
from regraft.export.genai import Genai
from regraft.export.merge import merge, plan_merge
from regraft.export.onnx import check_onnx, dequantized, round_trip, write_onnx
from regraft.export.survival import overall
from regraft.export.tensors import Reader

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="needs the extra onnx: pip install 'regraft[onnx]'"
)
LAX = {"max_mean_kl": 0.1, "max_form_mean_kl": 1.0, "min_form_top1_agreement": 0.3, "max_exact_match_drop": 1.0}
PARAMS = EvaluateParams(max_new_tokens=12, threads=1)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 400,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama in bf16 and two of its forms. Read them, don't write into them."""
    import tiny

    root = tmp_path_factory.mktemp("onnx")
    found = {"merged": tiny.make_base(root / "merged", dtype="bfloat16")}
    for form in ("onnx-fp32", "onnx-int4"):
        (root / form).mkdir()
        write_onnx(found["merged"], root / form, form)
        found[form] = root / form
    return found


@needs_onnx
def test_a_form_in_float32_splits_scores_and_answers_as_transformers_does(forms: dict[str, Path]) -> None:
    assert sorted(path.name for path in forms["onnx-fp32"].iterdir()) == [
        "chat_template.jinja",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]

    difference, same = compared(forms["merged"], forms["onnx-fp32"])

    assert difference < 1e-4
    assert same


@needs_onnx
def test_an_answer_ends_where_the_folder_s_settings_say(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(forms["onnx-fp32"], tmp_path / "form")
    prompt = [5, 6, 7]
    whole, stopped = Genai(folder, PARAMS)._generate(prompt, 12)
    assert (len(whole), stopped) == (12, False)
    settings = json.loads((folder / "genai_config.json").read_bytes())
    settings["model"]["eos_token_id"] = [2, whole[3]]
    (folder / "genai_config.json").write_text(json.dumps(settings))

    assert Genai(folder, PARAMS)._generate(prompt, 12) == (whole[: whole.index(whole[3])], True)


@needs_onnx
def test_a_form_in_4_bits_holds_what_its_survival_is_measured_with(forms: dict[str, Path]) -> None:
    import onnx
    import torch
    from onnx.numpy_helper import to_array

    model = onnx.load(forms["onnx-int4"] / "model.onnx")
    stored = {each.name: torch.from_numpy(to_array(each).copy()) for each in model.graph.initializer}
    weights = small.tensors(forms["merged"])

    name = "model.layers.{}.mlp.{}_proj"
    for layer, kind in ((0, "gate"), (1, "down")):
        module = name.format(layer, kind)
        packed, scales = stored[f"{module}.MatMul.weight_Q4"], stored[f"{module}.MatMul.weight_scales"]
        expected = round_trip(weights[f"{module}.weight"], 4)
        assert torch.equal(dequantized(packed, scales, 4), expected)
        assert 0.05 < float((expected - weights[f"{module}.weight"]).norm() / expected.norm()) < 0.2


@needs_onnx
def test_weights_that_no_block_divides_come_back_from_few_bits() -> None:
    import torch

    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))

    for bits, error in ((8, 0.01), (4, 0.15)):
        back = round_trip(weight, bits)
        assert back.shape == weight.shape
        assert float((back - weight).norm() / weight.norm()) < error


@needs_onnx
def test_a_change_of_one_percent_is_lost_in_4_bits_and_not_in_8(tmp_path: Path) -> None:
    base = small.make_llama(tmp_path / "base", dtype="float32")
    adapter = small.make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    shrink(adapter, 0.0004)
    plan = plan_merge(base, adapter, "fp32")
    (tmp_path / "merged").mkdir()
    merge(plan, tmp_path / "merged")

    assert _in_blocks(plan, tmp_path / "merged", "onnx-fp32", Reader.blocks) == []
    eight = _in_blocks(plan, tmp_path / "merged", "onnx-int8", Reader.blocks)
    four = _in_blocks(plan, tmp_path / "merged", "onnx-int4", Reader.blocks)

    assert [each.name for each in four] == [step.target.name for step in plan.steps if step.terms]
    assert all(0.005 < each.relative < 0.02 for each in four), [each.relative for each in four]
    assert (overall(eight) or 0) > 0.8
    assert (overall(four) or 1) < 0.4


@needs_onnx
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}, r"olmo \(OlmoForCausalLM\), tried are Gemma"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None}, "no architecture named"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rotary embedding is linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "its rotary embedding is yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5 of a head is rotated"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16},
            r"last 16 tokens only \(sliding_window\)",
        ),
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "differs for long texts"),
    ],
)
def test_what_the_builder_writes_otherwise_than_it_computes_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))

    with pytest.raises(ParamsError, match=said) as refusal:
        check_onnx(tmp_path, tmp_path)
    assert "export.forms" in str(refusal.value)
    with pytest.raises(ParamsError, match=said):
        write_onnx(tmp_path, tmp_path / "out", "onnx-fp32")


@needs_onnx
@pytest.mark.parametrize("family", ["llama", "tinyllama", "mistral", "zephyr"])
def test_a_tokenizer_that_is_read_otherwise_is_refused_with_both_lists_of_ids(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 700}))
    pieces.save(family, tmp_path)

    with pytest.raises(DamagedArtifact, match=r"onnxruntime-genai splits \d+ of \d+ texts .* is \[.*\], expected \["):
        check_onnx(tmp_path, tmp_path)


@needs_onnx
@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2"])
def test_tokenizers_that_are_read_alike_are_taken(tmp_path: Path, split: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 650}))
    byte_level(split).save_pretrained(tmp_path)

    check_onnx(tmp_path, tmp_path)


@needs_onnx
def test_gemmas_tokenizer_is_taken(tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 700}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))
    pieces.save("gemma", tmp_path)

    check_onnx(tmp_path, tmp_path)


@needs_onnx
def test_a_chat_template_that_is_rendered_otherwise_is_refused(tmp_path: Path) -> None:
    import tiny

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tiny.CHATML
    tokenizer.save_pretrained(tmp_path)
    check_onnx(tmp_path, tmp_path)

    tokenizer.chat_template = "{{ messages | map(attribute='content') | map('upper') | join('|') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DamagedArtifact, match=r"onnxruntime-genai (renders a conversation otherwise|cannot render)"):
        check_onnx(tmp_path, tmp_path)


@needs_onnx
def test_a_unigram_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)

    with pytest.raises((ParamsError, DamagedArtifact), match=r"Unigram|cannot read the tokenizer"):
        check_onnx(tmp_path, tmp_path)


@needs_onnx
def test_a_form_that_a_base_cannot_have_is_refused_before_anything_is_merged(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = exported.copy(tmp_path / "clone")
    before = small.contents(clone.exports)
    monkeypatch.delitem(importlib.import_module("regraft.export.onnx")._ARCHITECTURES, "llama")
    monkeypatch.setattr("regraft.export.export.plan_merge", lambda *_: pytest.fail("a merge began"))

    with pytest.raises(ParamsError, match="it is a llama"):
        small.export_here(clone.root, forms=["onnx-fp32"], **LAX)

    assert small.contents(clone.exports) == before
    assert [path.name for path in (clone.exports / ".work").iterdir()] == ["lock"]


@pytest.mark.parametrize("package", ["onnxruntime_genai", "onnx_ir"])
def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingInput, match=r"the package \S+ is not installed") as refusal:
        check_onnx(tmp_path, tmp_path)
    assert "regraft[onnx]" in str(refusal.value)


@needs_onnx
def test_a_builder_that_fails_leaves_nothing_and_is_quoted(forms: dict[str, Path], tmp_path: Path) -> None:
    merged, out = shutil.copytree(forms["merged"], tmp_path / "merged"), tmp_path / "out"
    out.mkdir()
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    with pytest.raises(RegraftError, match=r"builder ended with code 1: .*(?i:safetensor|incomplete)"):
        write_onnx(merged, out, "onnx-fp32")
    assert list(out.iterdir()) == []


@needs_onnx
def test_nothing_is_reported_and_no_device_is_given_an_id(forms: dict[str, Path], tmp_path: Path) -> None:
    """onnxruntime from 1.29 on writes an id and a queue of events into `~/.cache` before it sends anything."""
    code = (
        "import sys; from pathlib import Path; from regraft.export.genai import Genai, splitting\n"
        "from regraft.evaluate.params import EvaluateParams\n"
        "model = Genai(Path(sys.argv[1]), EvaluateParams(threads=1))\n"
        "print(model._generate([5, 6, 7], 3), splitting(Path(sys.argv[1]))[0]('lamp'))\n"
        "import onnxruntime; onnxruntime.InferenceSession(Path(sys.argv[1]) / 'model.onnx')"
    )
    hidden = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "GITHUB_ACTIONS")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code, str(forms["onnx-fp32"])],
        env={**environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extended
@needs_onnx
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma", {}),
        ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 16}),
        ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 256}),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": None, "original_max_position_embeddings": 512}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
    ],
)  # fmt: skip
def test_every_architecture_that_is_taken_has_transformers_logits_and_equal_bytes_again(
    tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    import tiny

    tokenizer = tiny.make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    merged = small.make_model(kind, tmp_path / "merged", **{**sizes, **ids, **more})
    tokenizer.save_pretrained(merged)
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        write_onnx(merged, tmp_path / name, "onnx-fp32")

    difference, same = compared(merged, tmp_path / "once")

    assert difference < 1e-4
    assert same
    assert small.contents(tmp_path / "once") == small.contents(tmp_path / "again")


@pytest.mark.extended
@needs_onnx
def test_onnx_forms_are_published_measured_and_a_flipped_byte_in_one_is_found(exported: Any, tmp_path: Path) -> None:
    clone = exported.copy(tmp_path / "clone")

    report = small.export_here(clone.root, forms=["onnx-fp32", "onnx-int8", "onnx-int4"], **LAX)

    folder = clone.exports / report.folder
    certificate = verify_export(folder)
    full, eight, four = certificate.forms
    chosen = next(each for each in certificate.candidates if each.source == certificate.chosen)
    assert (full.parity, eight.parity, four.parity) != (None, None, None)
    assert chosen.parity is not None
    assert full.parity is not None
    assert abs((full.parity.mean_kl or 1) - (chosen.parity.mean_kl or 0)) < 1e-4
    assert full.survival == []
    assert 0.8 < (overall(four.survival) or 0) < (overall(eight.survival) or 0) < 1
    assert {"onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"} <= certificate.environment.keys()
    assert "onnx-int4/model.onnx.data" in certificate.files
    weights = folder / "onnx-fp32/model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=r"onnx-fp32/model\.onnx\.data"):
        verify_export(folder)


@pytest.mark.extended
@needs_onnx
def test_a_form_in_4_bits_that_loses_the_change_is_refused_layer_by_layer(tmp_path: Path) -> None:
    small.make_clone(tmp_path, size=0.016)

    with pytest.raises(GateRefused, match=r"least left in model\.layers\.\d\.\S+: cosine 0?-?\.?\d"):
        small.export_here(tmp_path, forms=["onnx-int4"], candidates=["dequantized"], **LAX)

    (file,) = (tmp_path / "data/exports/refused").iterdir()
    failed = [each["name"] for each in json.loads(file.read_bytes())["verdict"]["checks"] if not each["passed"]]
    assert failed == ["onnx-int4.delta_survival"]


def compared(merged: Path, folder: Path) -> tuple[float, bool]:
    """The largest difference of log-probabilities over answers, and whether greedy answers are the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.evaluate.score import answer_rows
    from regraft.export.parity import log_probabilities

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    rows = list(held_out(tokenizer))
    genai = Genai(folder, PARAMS)
    assert genai.check_tokens(rows, tokenizer) == len(rows)
    theirs = torch.cat([chances for chances, _ in genai.log_probabilities(rows, PARAMS)])
    mine = torch.cat([chances for chances, _ in log_probabilities(model, rows, PARAMS)])
    answers = answer_rows(model, tokenizer, rows, PARAMS, "transformers")
    found = genai.answers(rows, tokenizer, PARAMS)
    same = all(
        (one.generated, one.stopped) == (other.generated, other.stopped)
        for one, other in zip(answers, found, strict=True)
    )
    assert [round(each.loss, 3) for each in found] == [round(each.loss, 3) for each in answers]
    return float((mine - theirs).abs().max()), same


def held_out(tokenizer: Any) -> Iterator[HeldOutRow]:
    for row in small.conversations(tokenizer, small.REQUESTS, small.ANSWERS):
        names = ("row_id", "answer", "prompt_ids", "input_ids", "labels")
        yield HeldOutRow(slices=dict(row["slices"]), **{name: row[name] for name in names})


def shrink(adapter: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    scaled = {name: each * factor if "lora_B" in name else each for name, each in load_file(file).items()}
    save_file(scaled, file, {"format": "pt"})


def byte_level(split: str) -> Any:
    """A tokenizer that splits as a family's does, with added tokens of both kinds."""
    import tiny
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from regraft.export.vocabulary import _SPLITS

    tokenizer = Tokenizer(models.BPE())
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [
        pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{tiny.WORDS} über naïve 日本語 12345 don't I'LL"] * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=tiny.CHATML
    )
    made.add_tokens([AddedToken("order_no", normalized=False), AddedToken("<|call|>", special=True)])
    return made
