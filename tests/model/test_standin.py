"""The stand-in base model: small, the same every time, and loadable like a downloaded one."""

import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from regraft.model.standin import StandinParams, llama_config, make_standin, parameter_count, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = StandinParams(
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=1,
    kv_heads=1,
    vocabulary=320,
    steps=3,
    batch_size=4,
    threads=1,
)
AWKWARD = 'Wo ist meine Lampe? \u00e4\u00f6\u00fc \u20ac \U0001f600\tand {"item": "lamp"}\n  two  blanks, it\'s 3.5'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two hundred documents of the shipped corpus."""
    documents = (ROOT / "data/shipped/corpus.txt").read_text(encoding="utf-8").split("\n\n")[:200]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def standin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in after three steps."""
    out = tmp_path_factory.mktemp("standin") / "base"
    make_standin(corpus, out, TINY)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_inputs_give_the_same_bytes(corpus: Path, standin: Path, tmp_path: Path) -> None:
    make_standin(corpus, tmp_path / "again", TINY)
    assert digests(tmp_path / "again") == digests(standin)


def test_the_same_inputs_give_the_same_bytes_with_two_threads_too(corpus: Path, tmp_path: Path) -> None:
    params = TINY.model_copy(update={"threads": 2})
    make_standin(corpus, tmp_path / "first", params)
    make_standin(corpus, tmp_path / "again", params)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")


def test_another_seed_gives_other_weights_and_the_same_tokenizer(corpus: Path, standin: Path, tmp_path: Path) -> None:
    make_standin(corpus, tmp_path / "other", TINY.model_copy(update={"seed": TINY.seed + 1}))
    ours, other = digests(standin), digests(tmp_path / "other")
    assert {name for name in ours if ours[name] != other[name]} == {"model.safetensors"}


def test_it_writes_what_a_model_from_a_hub_has(standin: Path) -> None:
    assert {path.name for path in standin.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_pytorch_is_left_as_it_was(corpus: Path, tmp_path: Path) -> None:
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    make_standin(corpus, tmp_path / "base", TINY.model_copy(update={"threads": threads + 1, "steps": 1}))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_training_lowers_the_loss(corpus: Path, standin: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_standin(corpus, tmp_path / "longer", TINY.model_copy(update={"steps": 40}))
    ids = AutoTokenizer.from_pretrained(standin)(
        corpus.read_text(encoding="utf-8")[:1500], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        short, longer = (
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids[:, :400], labels=ids[:, :400]).loss.item()
            for folder in (standin, tmp_path / "longer")
        )
    assert longer < short - 0.5


def test_a_folder_with_something_in_it_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        make_standin(corpus, tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("where is my lamp", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocabulary asks for 320"):
        make_standin(tmp_path / "corpus.txt", tmp_path / "base", TINY)
    assert not (tmp_path / "base").exists()


def test_the_default_model_has_between_400_000_and_1_000_000_parameters() -> None:
    assert 400_000 <= parameter_count(StandinParams()) <= 1_000_000


def test_the_parameter_count_is_the_models(corpus: Path) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = train_tokenizer(corpus.read_text(encoding="utf-8").split("\n\n"), StandinParams())
    for params in (StandinParams(), TINY):
        model = LlamaForCausalLM(llama_config(tokenizer, params))
        assert model.num_parameters() == parameter_count(params)


def test_every_linear_layer_divides_into_nf4_blocks(corpus: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = train_tokenizer(corpus.read_text(encoding="utf-8").split("\n\n"), TINY)
    model = LlamaForCausalLM(llama_config(tokenizer, StandinParams()))
    widths = {width for m in model.modules() if isinstance(m, torch.nn.Linear) for width in m.weight.shape}
    assert {width % 64 for width in widths} == {0}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 3}, "heads: 3 must divide"),
        ({"kv_heads": 3}, "kv_heads: 3 must divide heads 4"),
        ({"kv_heads": 1}, "keys are 32 wide"),
        ({"context_length": 64}, "context_length: 64 is under"),
        ({"hidden_size": 100}, "multiple of 64"),
        ({"layer": 2}, "layer"),
    ],
)
def test_shapes_that_do_not_fit_are_named(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        StandinParams.model_validate(wrong)


def test_the_template_renders_chatml_with_and_without_a_system_message(standin: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(standin)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{}"}]
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == chat
    system = [{"role": "system", "content": "Be kind."}]
    assert tokenizer.apply_chat_template(system + turns, tokenize=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n" + chat
    )
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert chat.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_any_text_survives_the_tokenizer_and_markers_are_single_tokens(standin: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(standin)
    assert tokenizer.decode(tokenizer(AWKWARD).input_ids) == AWKWARD
    assert len(tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids) == 3
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == TINY.vocabulary


def test_the_stop_and_padding_tokens_agree_between_model_and_tokenizer(standin: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(standin), AutoModelForCausalLM.from_pretrained(standin)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_pre_tokenizer_is_gpt2s_which_llama_cpp_knows(standin: Path) -> None:
    import json

    tokenizer = json.loads((standin / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert tokenizer["model"]["type"] == "BPE"
