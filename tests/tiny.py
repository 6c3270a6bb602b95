"""What tests share: a tiny random Llama with a ChatML tokenizer, made on the spot for the real loading code."""

import importlib.util
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "where is my lamp sofa desk chair order cancel return track today tomorrow please could you tell me the of a it "
    '{"action": "track_order", "item": "lamp"} {"action": "cancel_order", "item": "sofa", "day": "monday"} what opening '
    "hours store refund has not arrived broken change delivery How many? 0 1 2 3 4 5 6 7 8 9 + - = #### natalia sold"
)


def make_tokenizer(vocabulary: int = 400) -> Any:
    """Train a ByteLevel BPE tokenizer on a few words, with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_base(folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0, dtype: str = "float32") -> Path:
    """Write config, safetensors weights and tokenizer of a random Llama (about 0.1 M parameters) into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_infra(name: str) -> Any:
    """Import `infra/NAME.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / f"infra/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
