"""The short way gives exactly what the template gives, and is taken only where it may be."""

import random
from typing import Any

import numpy as np
import pytest
import tiny

from regraft.chat import Chat
from regraft.preprocess import columns
from regraft.preprocess.audit import Audit
from regraft.preprocess.columns import Encoder, ShortWayFailed, Talks, Tokens
from regraft.preprocess.skeleton import Skeletons

QWEN = (  # as Qwen 3 treats thoughts: in earlier answers they are cut out
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = tiny.CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
).replace(
    "{{ message['role'] }}\n", "{{ message['role'] }}\n{% if message['role'] == 'assistant' %}<think>\n{% endif %}"
)
WORDS = [
    "where is my lamp", " leading", "trailing\n", "\n\n", "a <|im_end|> typed", "\u6f22\u5b57 e\u0301", "x" * 400, "ok</think>\n\nyes",
    '{"action": "track_order"}', "1\n2\n3", "<<48/2=24>> #### 24", "\U0001f600", "a\u00a0b", "don't", "-", " ", "qzw000wzq",
]  # fmt: skip


def talks(count: int, seed: int) -> Talks:
    dice = random.Random(seed)
    messages = []
    for _ in range(count):
        some = [{"role": "system", "content": dice.choice(WORDS)}] if dice.random() < 0.3 else []
        for _ in range(dice.randint(1, 3)):
            some += [{"role": role, "content": dice.choice(WORDS)} for role in ("user", "assistant")]
        if dice.random() < 0.1:
            some.append({"role": "user", "content": "thanks"})
        messages.append(some)
    return Talks(list(range(count)), messages, [f"row {i}" for i in range(count)])


def encoded(tokenizer: Any, some: Talks, *, short: bool, supervise: Any) -> tuple[dict[int, Any], Any, Any]:
    chat = Chat(tokenizer, tokenizer.chat_template)
    audit, made = Audit(chat, tokenizer), Tokens()
    Encoder(chat, tokenizer, supervise, 300, short=short).encode(some, made, audit)
    lengths, prompts, trained = (np.concatenate(each) for each in (made.lengths, made.prompts, made.trained))
    ids, labels = np.concatenate(made.ids), np.concatenate(made.labels)
    ends = np.cumsum(lengths)
    rows = {
        place: (ids[end - size : end].tolist(), labels[end - size : end].tolist(), int(prompt), int(learned))
        for place, end, size, prompt, learned in zip(made.places, ends, lengths, prompts, trained, strict=True)
    }
    measured = audit.result(0.0).model_copy(update={"agreement_rows": 0, "agreement": 0.0})
    return rows, measured, (sorted(made.too_long), sorted(made.nothing))


@pytest.mark.parametrize("template", [tiny.CHATML, QWEN, THINKING])
@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_both_ways_give_the_same_tokens_labels_and_audit(template: str, supervise: str) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    some = talks(300, 1)
    if template == QWEN:  # the template itself renders answers with thoughts in a way that cannot be learned
        for messages in some.messages:
            for message in messages:
                message["content"] = message["content"].replace("</think>", "").strip() or "x"
    assert encoded(tokenizer, some, short=True, supervise=supervise) == encoded(
        tokenizer, some, short=False, supervise=supervise
    )


def skeletons(template: str) -> Skeletons:
    tokenizer = tiny.make_tokenizer()
    return Skeletons(Chat(tokenizer, template), tokenizer, "assistant")


def test_plain_templates_have_a_skeleton_and_what_they_look_for_is_known() -> None:
    roles = ("user", "assistant")
    plain = skeletons(tiny.CHATML).of(roles)
    assert plain is not None
    assert (plain[1], plain[0].controls, len(plain[0].answers)) == (frozenset(), 4, 1)
    looking = skeletons(QWEN).of(roles)
    assert looking is not None
    assert looking[1] == {"</think>"}


@pytest.mark.parametrize(
    "changed",
    [
        "message['content'] | upper",
        "message['content'][:3]",
        "(message['content'] + 'x') | trim",
        "message['content'] | length",
    ],
)
def test_a_template_that_does_more_with_the_words_has_no_skeleton(changed: str) -> None:
    template = tiny.CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{% set x = " + changed + " %}")
    assert skeletons(template).of(("user", "assistant")) is None


def test_a_template_whose_look_at_the_words_was_not_seen_is_found_out() -> None:
    tokenizer = tiny.make_tokenizer()
    # `~` makes a plain string, in which nobody sees the template look for a word
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ message['content'] }}", "{{ ((message['content'] ~ '') | replace('lamp', 'sofa')) }}"
    )
    chat = Chat(tokenizer, tokenizer.chat_template)
    messages = [{"role": "user", "content": "where is my lamp"}, {"role": "assistant", "content": "here"}]
    with pytest.raises(ShortWayFailed):
        Encoder(chat, tokenizer, "assistant", 300, short=True).encode(Talks([0], [messages], ["row"]), Tokens(), None)


def test_words_in_any_script_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_by_template", lambda *_: pytest.fail("the template was asked"))
    said = ["where is it", "\u6f22\u5b57 na\u00efve", "\U0001f600!"]
    messages = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one in said for other in said
    ]
    tokenizer = tiny.make_tokenizer()
    made = Tokens()
    encoder = Encoder(Chat(tokenizer, tokenizer.chat_template), tokenizer, "assistant", 300, short=True)
    encoder.encode(Talks(list(range(9)), messages, [""] * 9), made, None)
    assert sorted(made.places) == list(range(9))


def test_long_texts_are_tokenised_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_TOKENISED", 3)
    monkeypatch.setattr(columns, "_LONG", 10)
    texts = ["", "a", "b", "c", "x" * 11, "x" * 4, "y" * 6, "z", "x" * 10, "x" * 30]
    batches = [list(each) for each in columns._batches(texts)]
    assert [len(each) for each in batches] == [3, 1, 1, 2, 1, 1, 1]
    assert [text for each in batches for text in each] == texts
    assert list(columns._batches([])) == []
