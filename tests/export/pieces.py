"""Sentencepiece tokenizers of the four families that people fine-tune, and llama.cpp's way of reading them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPACE = "▁"
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {"llama": TURNS, "mistral": TURNS, "tinyllama": MARKS, "zephyr": MARKS, "gemma": GEMMA}
"""The families; see `make`."""


def make(family: str, size: int = 600) -> Any:
    """Train a tokenizer on the spot.

    Args:
        family: `llama` and `tinyllama` have a space before the text only (LlamaTokenizer as transformers 5 makes it of
            `legacy: false`), `mistral` before every piece that has none (`legacy: true`), `zephyr` before every piece (the
            normalizer in older tokenizer.json files), `gemma` none, with runs of spaces and newlines as tokens.
        size: tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    gemma = family == "gemma"
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    own = ["\n" * n for n in range(2, 5)] + [SPACE * n for n in range(2, 8)] if gemma else []
    learnt = _learn(size)
    words = {text: -float(place) for place, text in enumerate([*own, *learnt])}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {text: number for number, text in enumerate([*specials, *bytes_, *words])}
    if gemma:
        vocabulary["\t"] = vocabulary["<0x09>"]
    merges = generate_merges(vocabulary, vocab_scores=words)
    if gemma:
        made: Any = GemmaTokenizer(vocab=vocabulary, merges=merges, chat_template=GEMMA, add_bos_token=True)
        made.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
        made.add_tokens([AddedToken(text, normalized=False) for text in own])
    elif family == "zephyr":
        tokenizer = Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
        )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MARKS
        )
    else:
        made = LlamaTokenizer(
            vocab=vocabulary,
            merges=merges,
            legacy=family == "mistral",
            chat_template=TEMPLATES[family],
            add_bos_token=True,
        )
    return made


def save(family: str, folder: Path) -> Path:
    """Write such a tokenizer as the hub has it: transformers 5 reads `legacy` and `add_bos_token`, and saves neither."""
    import json

    make(family).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    more = {"mistral": {"legacy": True}, "llama": {"legacy": False}, "tinyllama": {"legacy": False}}.get(family, {})
    bos = {} if family == "zephyr" else {"add_bos_token": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **more, **bos}))
    return folder


def _learn(size: int) -> list[str]:
    """Pieces in the order in which they were merged, then single characters."""
    import tiny
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = f"{tiny.WORDS} Where is it? Be brief. {{}} user assistant aaaaaaaa ==== ---- über naïve 日本語 нет def return x = y"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    by_place = sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
    return [each for each, _ in by_place if len(each) > 1] + [each for each, _ in by_place if len(each) == 1]


def make_base(folder: Path, family: str, kind: str | None = None, **more: Any) -> Path:
    """A random model with such a tokenizer: a Gemma 2 for `gemma`, else a Llama or a Mistral, or of the `kind` named."""
    import small
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(save(family, folder))
    kind = kind or {"gemma": "gemma2", "mistral": "mistral", "zephyr": "mistral"}.get(family, "llama")
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer) + 3, "hidden_size": 64, "head_dim": None}
    sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"pad_token_id": None, "max_position_embeddings": 512}
    if kind.startswith("gemma"):
        sizes |= {"query_pre_attn_scalar": 16, "head_dim": 16}
    small.make_model(kind, folder, dtype="float32", **{**sizes, **more})
    return folder


class Spm:
    """The tokenizer of a GGUF file as llama.cpp reads it: `llm_tokenizer_spm` and `tokenizer_st_partition`, without llama.cpp."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        self.fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
        assert self.fields["tokenizer.ggml.model"] == "llama"
        self.tokens: list[str] = self.fields["tokenizer.ggml.tokens"]
        self.kinds: list[int] = self.fields["tokenizer.ggml.token_type"]
        self.scores: list[float] = self.fields["tokenizer.ggml.scores"]
        self.ids = {text: number for number, text in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens)
        whole = [text for text, kind in zip(self.tokens, self.kinds, strict=True) if kind in (2, 3, 4)]
        self._special = sorted(whole, key=len, reverse=True)

    def split(self, text: str) -> list[int]:
        """Ids of a text, `bos` left out."""
        fragments: list[str | int] = [text] if text else []
        for special in self._special:
            cut: list[str | int] = []
            for each in fragments:
                if isinstance(each, int):
                    cut.append(each)
                    continue
                for i, part in enumerate(re.split(f"({re.escape(special)})", each)):
                    cut += [self.ids[special] if i % 2 else part] if part else []
            fragments = cut
        found: list[int] = []
        after_special = True
        for each in fragments:
            if isinstance(each, int):
                found.append(each)
            else:
                before = " " if self.fields["tokenizer.ggml.add_space_prefix"] and after_special else ""
                found += self._merge((before + each).replace(" ", SPACE))
            after_special = isinstance(each, int)
        return found

    def _merge(self, text: str) -> list[int]:
        symbols = list(text)
        while True:
            pairs = [(self._score(symbols[i] + symbols[i + 1]), -i) for i in range(len(symbols) - 1)]
            best = max((pair for pair in pairs if pair[0] is not None), default=None)
            if best is None:
                return [number for symbol in symbols for number in self._ids(symbol)]
            symbols[-best[1] : 2 - best[1]] = ["".join(symbols[-best[1] : 2 - best[1]])]

    def _score(self, text: str) -> float | None:
        return self.scores[self.ids[text]] if text in self.ids else None

    def _ids(self, symbol: str) -> Sequence[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
