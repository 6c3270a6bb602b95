"""The stand-in base model: a small Llama trained from scratch on the shipped corpus, so that a first run needs no hub.

It plays the part of a downloaded model: it knows the domain's language and the chat format, and has never seen which
request leads to which action. Quality comes from a fixed number of steps, never from a time limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from regraft.params import Section

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

_PADDING = -100  # of targets
_POOL = 8  # batches
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class StandinParams(Section):
    """What the stand-in is made of and how it is trained; 0.4 to 1 M parameters in total, embeddings included."""

    hidden_size: int = Field(default=128, ge=64, le=512, multiple_of=64)
    """Width of the residual stream, in units; 64 to 512. NF4 quantises in blocks of 64 weights."""

    intermediate_size: int = Field(default=384, ge=64, le=2048, multiple_of=64)
    """Width of the feed-forward layers, in units; 64 to 2048. Three times the hidden size, as gated layers use."""

    layers: int = Field(default=3, ge=1, le=16)
    """Transformer blocks; 1 to 16. To copy a word out of a request takes two at least."""

    heads: int = Field(default=4, ge=1, le=32)
    """Query heads a block; 1 to 32. Must divide the hidden size; 32 units a head."""

    kv_heads: int = Field(default=2, ge=1, le=32)
    """Key and value heads a block; 1 to 32. Must divide the query heads; fewer of them, as in current Llama models."""

    vocabulary: int = Field(default=1024, ge=300, le=32768)
    """Tokens, special ones included; 300 to 32768. 1024 keeps most of the shop's words whole, in a fifth of
    the weights."""

    sequence_length: int = Field(default=128, ge=16, le=4096)
    """Tokens of a document that are trained on; 16 to 4096. Nearly every document of the shipped corpus fits."""

    context_length: int = Field(default=512, ge=16, le=32768)
    """Positions that the saved model declares, in tokens; 16 to 32768. Must hold sequence_length."""

    batch_size: int = Field(default=24, ge=1, le=1024)
    """Documents in a step; 1 to 1024. Smaller batches train better for each token and slower for each second."""

    steps: int = Field(default=700, ge=1, le=100_000)
    """Optimizer steps; 1 to 100,000. To copy a kind of slot is learnt in a sudden jump, and what is not learnt here
    an adapter has to learn: with three seeds every kind was copied at least nine times in ten after 700 steps."""

    learning_rate: float = Field(default=6e-3, gt=0, le=0.1)
    """Peak rate of Muon and AdamW, warmed up over a twentieth of the steps, then cosine to a tenth; up to 0.1."""

    weight_decay: float = Field(default=0.05, ge=0, le=1)
    """Decoupled decay of matrices; 0 to 1. A little: the corpus is passed more than once."""

    seed: int = Field(default=7, ge=0, lt=2**31)
    """Seeds the weights and the order of the documents; 0 to 2^31 - 1."""

    threads: int = Field(default=2, ge=1, le=64)
    """Threads that PyTorch computes with; 1 to 64. Fixed, because sums may be split differently among more of them."""

    @model_validator(mode="after")
    def _check_shapes(self) -> "StandinParams":
        problems = []
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            problems.append(f"heads: {self.heads} must divide hidden_size {self.hidden_size} into an even width")
        if self.heads % self.kv_heads:
            problems.append(f"kv_heads: {self.kv_heads} must divide heads {self.heads}")
        elif self.hidden_size // self.heads * self.kv_heads % 64:
            problems.append(
                f"kv_heads: keys are {self.hidden_size // self.heads * self.kv_heads} wide, not a multiple of 64"
            )
        if self.context_length < self.sequence_length:
            problems.append(f"context_length: {self.context_length} is under sequence_length {self.sequence_length}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def parameter_count(params: StandinParams) -> int:
    """Return the number of weights of the model that these parameters describe; embeddings are tied and count once."""
    hidden, keys = params.hidden_size, params.hidden_size // params.heads * params.kv_heads
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * params.intermediate_size + 2 * hidden
    return params.vocabulary * hidden + params.layers * block + hidden


def make_standin(corpus: Path, out: Path, params: StandinParams) -> None:
    """Train the stand-in on `corpus` and write it to the folder `out`, as a model from a hub would lie there.

    `corpus` is UTF-8 text, documents parted by an empty line; chats are written in ChatML. `out` must not exist or be
    empty. The same corpus, parameters and library versions on the same kind of processor give the same bytes.

    Raises:
        FileExistsError: if `out` has something in it.
        ValueError: if the corpus is too small for the vocabulary.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: give a new folder for the stand-in, or remove it first")
    documents = corpus.read_text(encoding="utf-8").strip().split("\n\n")

    tokenizer = train_tokenizer(documents, params)
    if len(tokenizer) < params.vocabulary:
        raise ValueError(
            f"{corpus} gives {len(tokenizer)} tokens, params.vocabulary asks for {params.vocabulary}: lower it or add text"
        )
    with _deterministic(params):
        model = _train(encode(documents, tokenizer, params), llama_config(tokenizer, params), params)
        out.mkdir(parents=True, exist_ok=True)
        # float32: the weights are what was trained, NF4 and a 16-bit merge each round them once, and it is 3 MB.
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(documents: list[str], params: StandinParams) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer with GPT-2's pre-tokenizer, which llama.cpp knows, and a ChatML template.

    Any text survives encoding and decoding. The stop token is `<|im_end|>`; padding is `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, IM_START, IM_END]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The markers are tokens of their own: left in, they would be learnt as text too.
    plain = (document.translate({0: None}).replace(IM_START, "").replace(IM_END, "") for document in documents)
    bpe.train_from_iterator(plain, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHATML,
        model_max_length=params.context_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def llama_config(tokenizer: "PreTrainedTokenizerFast", params: StandinParams) -> "LlamaConfig":
    """Return the Llama configuration for this tokenizer and these parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=params.vocabulary,
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        max_position_embeddings=params.context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        initializer_range=0.04,
        dtype="float32",
    )


def encode(documents: list[str], tokenizer: "PreTrainedTokenizerFast", params: StandinParams) -> "list[torch.Tensor]":
    """Return each document's tokens, `<|endoftext|>` last, cut at `sequence_length`."""
    import torch

    stop = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return [torch.tensor([*tokens, stop][: params.sequence_length]) for tokens in encoded]


def _batches(documents: "list[torch.Tensor]", params: StandinParams) -> "Iterator[torch.Tensor]":
    """Yield padded batches for ever, each pass in an order of its own.

    A document has a row to itself: with others before it, the words to copy hid among theirs and copying was not learnt.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    shuffler = torch.Generator().manual_seed(params.seed)
    while True:
        order = torch.randperm(len(documents), generator=shuffler).tolist()
        # Rows of like length share a batch, which saves padding, but only among neighbours: a batch stays a mixture.
        for pool in (
            order[at : at + _POOL * params.batch_size] for at in range(0, len(order), _POOL * params.batch_size)
        ):
            pool.sort(key=lambda index: len(documents[index]))
            parts = [pool[at : at + params.batch_size] for at in range(0, len(pool), params.batch_size)]
            for part in torch.randperm(len(parts), generator=shuffler).tolist():
                rows = [documents[index] for index in parts[part]]
                yield pad_sequence(rows, batch_first=True, padding_value=_PADDING)


def _train(documents: "list[torch.Tensor]", config: "LlamaConfig", params: StandinParams) -> Any:
    """Return the trained `LlamaForCausalLM`."""
    import math

    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    optimizers = _optimizers(model, params)
    warmup = max(1, params.steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, params.steps - warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for _, batch in zip(range(params.steps), _batches(documents, params), strict=False):
        # Padding is on the right, where causal attention does not look.
        logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits
        targets = batch[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=_PADDING)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def _optimizers(model: Any, params: StandinParams) -> "list[torch.optim.Optimizer]":
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    With AdamW alone, a thousand steps left some kinds of slot uncopied, and which ones changed with the seed; Muon
    (https://kellerjordan.github.io/posts/muon/) copies all of them in half the steps. Its updates are scaled to AdamW's
    size (https://arxiv.org/abs/2502.16982), so that both share one rate.
    """
    import torch

    of_blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    gains = [p for p in model.parameters() if p.ndim < 2]
    rate, decay = params.learning_rate, params.weight_decay
    return [
        torch.optim.Muon(of_blocks, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


@contextmanager
def _deterministic(params: StandinParams) -> Iterator[None]:
    """Seed PyTorch, fix its threads and allow only deterministic operations; put all three back afterwards."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        torch.set_num_threads(params.threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
