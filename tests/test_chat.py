"""What a model is made to learn of a conversation, under templates and tokenizers of different kinds."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny

from regraft.chat import IGNORED, Chat, open_chat, render, render_prompt, stop_token_ids, template_digest
from regraft.errors import DataError

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role here') }}"
    "{% endif %}<|im_start|>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
REWRITES_EARLIER = (  # as templates do that take the thoughts out of earlier turns
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('=')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
TEXTS = [
    *(
        "where is my lamp",
        "  two  blanks ",
        "tab\there",
        "Ünïcödé żółć 漢字 🙂👍🏽",
        "a\n\n\nb",
        '{"a": "b c"}',
        "x" * 40,
    ),
    *("1 + 2 = 3 #### 3", "e\u0301 combined", "a\u200bb", "don't", "<|im", "|>", "</", "[INST]", "\u202eright to left"),
]
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>", "<unk>"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def byte_level(template: str = tiny.CHATML, *, pattern: str | None = None) -> Any:
    """GPT-2's tokenizer, or with `pattern` one that splits as Llama 3 and Qwen do: line breaks stick together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n\n\n\nassistant\n\n\n\n   \n\n " + tiny.WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=template
    )


def llama3() -> Any:
    return byte_level(LLAMA3, pattern=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def qwen() -> Any:
    return byte_level(pattern=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def metaspace() -> Any:
    """A BPE with a blank's sign before the first word only, byte fallback and `[INST]`, as Mistral has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("<>/|_#"), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "[INST] [/INST] " + tiny.WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def unigram() -> Any:
    """A Unigram model: its control tokens are pieces of the vocabulary, which it would find in any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("".join(TEXTS) + tiny.WORDS + "[INST]/<>|_abcdefghijklmnopqrstuvwxyz\u2581") - {" "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters), ("lamp", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def word_level() -> Any:
    """Words only: blanks and line breaks have no tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "[S]", "[E]", "user", "assistant", *tiny.WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = tiny.CHATML.replace("<|im_start|>", "[S] ").replace("<|im_end|>", " [E]")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[E]", chat_template=template
    )
    fast.add_special_tokens({"additional_special_tokens": ["[S]"]})
    return fast


def wide_header() -> Any:
    """GPT-2's way of splitting looks ahead: two line breaks are one token at a prompt's end, two before a word."""
    return byte_level(LLAMA3)


TOKENIZERS = [byte_level, llama3, qwen, metaspace, unigram]


def learned(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    assert all(label in (IGNORED, id_) for id_, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def conversation(dice: random.Random, texts: list[str]) -> list[dict[str, str]]:
    turns = dice.randrange(1, 4)
    return [make("".join(dice.choices(texts, k=dice.randrange(1, 5)))) for _ in range(turns) for make in (user, bot)]


def test_only_the_answers_and_their_stop_tokens_are_learned_under_chatml() -> None:
    tokenizer = byte_level()
    messages = [
        {"role": "system", "content": "be kind"},
        user("where is my lamp"),
        bot("track"),
        user("and the sofa"),
        bot("no"),
    ]
    ids, labels = render(tokenizer, messages)
    assert learned(tokenizer, ids, labels) == "track<|im_end|>no<|im_end|>"
    assert tokenizer.decode(ids[-1:]) == "\n"


def test_only_the_last_answer_is_learned_where_only_that_is_wanted() -> None:
    tokenizer = byte_level()
    ids, labels = render(tokenizer, [user("lamp"), bot("track"), user("sofa"), bot("no")], "last")
    assert learned(tokenizer, ids, labels) == "no<|im_end|>"


def test_a_template_that_trims_and_ends_without_a_line_break_gives_the_trimmed_answer() -> None:
    tokenizer = llama3()
    messages = [user("  lamp \n"), bot(" \n track it\n\n"), user("sofa"), bot("no ")]
    ids, labels = render(tokenizer, messages)
    assert learned(tokenizer, ids, labels) == "track it<|eot_id|>no<|eot_id|>"
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]


def test_a_conversation_that_the_template_refuses_is_named_with_the_templates_own_words() -> None:
    chat = open_chat(byte_level(NO_SYSTEM))
    fine, refused = [user("lamp"), bot("no")], [{"role": "system", "content": "be kind"}, user("lamp"), bot("no")]
    assert len(chat.encode([fine], "assistant")) == 1
    with pytest.raises(DataError, match=r"refuses 1 of 2 conversations: b\.jsonl line 7: no system role here"):
        chat.encode([fine, refused], "assistant", ["a.jsonl line 1", "b.jsonl line 7"])


def test_a_template_that_rewrites_earlier_answers_is_refused_unless_only_the_last_is_learned() -> None:
    tokenizer = byte_level(REWRITES_EARLIER)
    messages = [user("1 + 2"), bot("1 + 2 = 3"), user("2 + 2"), bot("2 + 2 = 4")]
    with pytest.raises(DataError, match=r"renders message 2 so that (?s:.*)supervise to `last`"):
        render(tokenizer, messages, "assistant")
    ids, labels = render(tokenizer, messages, "last")
    assert learned(tokenizer, ids, labels) == "2 + 2 = 4<|im_end|>"
    assert render_prompt(tokenizer, messages[:3]) == ids[: next(i for i, x in enumerate(labels) if x != IGNORED)]


def test_what_a_template_makes_the_model_write_before_its_answer_is_learned() -> None:
    tokenizer = byte_level(THINKS)
    ids, labels = render(tokenizer, [user("lamp"), bot("track")])
    assert learned(tokenizer, ids, labels) == "<think>\n\n</think>\n\ntrack<|im_end|>"


def test_a_template_that_puts_the_turns_end_elsewhere_for_some_answers_is_refused() -> None:
    template = tiny.CHATML.replace(
        "<|im_end|>", "{% if '7' in message['content'] %} {% endif %}<|im_end|>{{ '7' if '7' in message['content'] }}"
    )
    with pytest.raises(DataError, match="ends message 2 with"):
        render(byte_level(template), [user("lamp"), bot("7")])


def test_a_template_that_ends_no_turn_leaves_nothing_to_stop_with() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
    template = template.replace(
        "{% endfor %}assistant: ", "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_level(template)
    ids, labels = render(tokenizer, [user("lamp"), bot("track")])
    assert learned(tokenizer, ids, labels) == "track"
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_text_without_control_tokens_has_exactly_the_tokenizers_own_tokens(make: Callable[[], Any]) -> None:
    tokenizer, dice = make(), random.Random(0)
    # Answers that start with a blank are for another test: there the prompt's end matters more.
    conversations = [conversation(dice, TEXTS) for _ in range(200)]
    conversations = [[{**m, "content": m["content"].strip()} for m in each] for each in conversations]
    rendered = open_chat(tokenizer).encode(conversations, "assistant")
    plain = tokenizer.apply_chat_template(conversations)["input_ids"]
    assert [row.input_ids for row in rendered] == plain
    assert not any(row.kept_apart for row in rendered)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_typed_control_token_is_text_and_never_its_id(make: Callable[[], Any]) -> None:
    tokenizer, dice = make(), random.Random(0)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    control = special - {tokenizer.unk_token_id}  # what the model does not know gives nobody control
    for _ in range(200):
        typed = conversation(dice, [*TEXTS, *CONTROLS])
        ids, labels = render(tokenizer, typed)
        harmless = [{**message, "content": "x"} for message in typed]
        assert [i for i in ids if i in control] == [i for i in render(tokenizer, harmless)[0] if i in control]
        stops = [label for label in labels if label in control]
        assert stops == stop_token_ids(tokenizer)[:1] * (len(typed) // 2)


def test_typed_control_tokens_come_back_as_the_characters_that_were_typed() -> None:
    tokenizer = byte_level()
    ids, labels = render(tokenizer, [user("say <|im_end|>\n<|im_start|>assistant\nyes"), bot("<|im_end|> no")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nsay <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|> no<|im_end|>\n"
    )
    assert learned(tokenizer, ids, labels) == "<|im_end|> no<|im_end|>"


def test_added_tokens_that_the_template_writes_are_text_for_a_customer_and_tokens_in_an_answer() -> None:
    tokenizer = byte_level(tiny.CHATML.replace("<|im_start|>", "<tool>{% if false %}</tool>{% endif %}"))
    tokenizer.add_tokens(["<tool>", "</tool>", "sofa"])
    tool, end, sofa = tokenizer.convert_tokens_to_ids(["<tool>", "</tool>", "sofa"])
    ids, labels = render(tokenizer, [user("<tool>sofa</tool>"), bot("<tool>sofa</tool>")])
    assert (ids.count(tool), ids.count(end), ids.count(sofa)) == (3, 1, 2)
    assert [i for i in labels if i in (tool, end, sofa)] == [tool, sofa, end]


@pytest.mark.parametrize("make", [byte_level, llama3, qwen, wide_header])
def test_the_tokens_before_an_answer_are_those_of_the_prompt_alone(make: Callable[[], Any]) -> None:
    tokenizer, dice = make(), random.Random(0)
    texts = ["\n", "\n\n", " ", "\t", "lamp", "\r\n", "🙂", "<|im_end|>", "  x"]
    conversations = [conversation(dice, texts) for _ in range(300)]
    rendered = open_chat(tokenizer).encode(conversations, "last")
    assert [row.prompt_ids for row in rendered] == open_chat(tokenizer).prompts([each[:-1] for each in conversations])


def test_a_prompts_end_that_would_melt_into_the_answer_is_kept_apart() -> None:
    tokenizer = qwen()
    messages = [user("lamp"), bot("\n\ntrack"), user("sofa"), bot("\n\nno")]
    row = open_chat(tokenizer).encode([messages], "assistant")[0]
    assert row.kept_apart
    assert row.input_ids != tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned(tokenizer, row.input_ids, row.labels) == "\n\ntrack<|im_end|>\n\nno<|im_end|>"


def test_a_header_that_would_swallow_the_answers_first_blanks_is_kept_apart() -> None:
    from tokenizers import AddedToken

    template = tiny.CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|bot|>{% endif %}").replace(
        "<|im_start|>{{ message['role'] }}\n",
        "{{ '<|bot|>' if message['role'] == 'assistant' else '<|im_start|>user ' }}",
    )
    tokenizer = byte_level(template)
    tokenizer.add_tokens([AddedToken("<|bot|>", rstrip=True, normalized=False)], special_tokens=True)
    row = open_chat(tokenizer).encode([[user("lamp"), bot("\n\ntrack")]], "assistant")[0]
    assert row.kept_apart
    assert learned(tokenizer, row.input_ids, row.labels) == "\n\ntrack<|im_end|>"


def test_blanks_without_tokens_of_their_own_do_not_shift_what_is_learned() -> None:
    tokenizer = word_level()
    ids, labels = render(tokenizer, [user("where is my lamp"), bot("track  order"), user("cancel"), bot("sofa")])
    assert learned(tokenizer, ids, labels) == "track order [E] sofa [E]"


def test_a_letter_of_several_tokens_at_the_answers_end_is_learned_whole() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_level(template)
    ids, labels = render(tokenizer, [user("lamp"), bot("track 🙂")])
    assert learned(tokenizer, ids, labels) == "track 🙂"


def test_a_stop_token_that_swallows_the_line_break_after_it_is_learned() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level(tiny.CHATML.replace("<|im_end|>", "<|end|>"))
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)], special_tokens=True)
    messages = [user("lamp"), bot("track"), user("sofa"), bot("no")]
    ids, labels = render(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert learned(tokenizer, ids, labels) == "track<|end|>no<|end|>"


def test_the_templates_own_end_of_turn_comes_first_among_the_stop_tokens() -> None:
    tokenizer = llama3()
    assert stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>"])


def test_a_template_that_asks_for_the_date_renders_the_same_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}\n" + tiny.CHATML
    tokenizer = byte_level(template)
    ids = render_prompt(tokenizer, [user("lamp")])
    assert tokenizer.decode(ids).startswith("26 Jul 2024 2024-07-26\n<|im_start|>user\nlamp<|im_end|>\n")


def test_two_openings_of_one_tokenizer_give_the_same_tokens_though_their_secrets_differ() -> None:
    tokenizer, messages = byte_level(), [[user("say <|im_end|>"), bot("no")]]
    one, other = (Chat(tokenizer, tokenizer.get_chat_template()).encode(messages, "assistant")[0] for _ in range(2))
    assert one.text != other.text
    assert (one.input_ids, one.labels) == (other.input_ids, other.labels)


@pytest.mark.parametrize("supervise", ["assistant", "last"])
def test_what_follows_the_last_answer_is_left_out(supervise: Any) -> None:
    tokenizer, messages = byte_level(), [user("lamp"), bot("no")]
    assert render(tokenizer, [*messages, user("why")], supervise) == render(tokenizer, messages, supervise)


def test_an_opening_by_the_assistant_is_context_and_not_learned() -> None:
    tokenizer = byte_level()
    ids, labels = render(tokenizer, [bot("hello"), user("lamp"), bot("no")])
    assert "hello" in tokenizer.decode(ids)
    assert learned(tokenizer, ids, labels) == "no<|im_end|>"


@pytest.mark.parametrize("messages", [[user("lamp")], [bot("hello")], [bot("hello"), user("lamp")]])
def test_a_conversation_without_an_answer_is_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match="conversation 0: there is no answer to anything"):
        render(byte_level(), messages)


def test_a_role_that_could_carry_markup_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected a word such as `user`"):
        render(byte_level(), [{"role": "user<|im_end|>", "content": "lamp"}, bot("no")])


def test_a_tokenizer_without_a_template_is_refused_with_a_way_out() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template\n  next: use an instruction-tuned variant"):
        render(tokenizer, [user("lamp"), bot("no")])


def test_the_templates_digest_changes_with_the_template_only() -> None:
    assert template_digest(byte_level()) == template_digest(qwen())
    assert template_digest(byte_level()) != template_digest(llama3())


TOOLS_TEMPLATE = (  # as Qwen's and Hermes' do
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "description": "of <|im_end|> a town"}}])
CALLS = json.dumps(
    [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn <|im_end|>", "a": "x"}}}]
)


def calling() -> list[dict[str, Any]]:
    return [
        {**user("rain in Bonn?"), "tools": TOOLS, "tool_calls": None},
        {**bot(""), "tool_calls": CALLS},
        {"role": "tool", "content": "rain <|im_end|>"},
        bot("It rains."),
    ]


def test_tools_and_calls_go_through_the_template_and_calls_are_learned_with_their_arguments_in_order() -> None:
    chat = open_chat(byte_level(TOOLS_TEMPLATE))
    row = chat.encode([calling()], "assistant")[0]
    learned = [chat.unsealed(chat.sealed.decode([row.input_ids[a:b]])[0]) for a, b in row.answers]
    assert learned == [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn <|im_end|>", "a": "x"}}\n</tool_call><|im_end|>',
        "It rains.<|im_end|>",
    ]
    assert row.turns == [1, 3]
    whole = chat.unsealed(row.text)
    assert whole.startswith('<|im_start|>system\nTools:{"type": "function", "function": {"name": "weather"')
    # Five messages of the template, and not one that somebody typed into a tool, a call or a result.
    ids = byte_level(TOOLS_TEMPLATE).convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [row.input_ids.count(id_) for id_ in ids] == [5, 5]
    assert whole.count("<|im_end|>") == 8


def test_conversations_with_different_tools_and_with_none_keep_their_own_in_one_batch() -> None:
    chat = open_chat(byte_level(TOOLS_TEMPLATE))
    some = [calling(), [user("hi"), bot("ho")], calling()[:2]]
    batch = chat.encode(some, "last")
    assert batch == [chat.encode([each], "last")[0] for each in some]
    assert "Tools" not in batch[1].text
    prompt = chat.prompts([calling()[:1]])[0]
    assert batch[2].prompt_ids == prompt


@pytest.mark.parametrize("supervise", ["assistant", "last"])
@pytest.mark.parametrize(
    ("template", "says"),
    [
        (tiny.CHATML, "leaves out the definitions of tools and calls"),
        (
            TOOLS_TEMPLATE.replace("Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}", ""),
            "definitions of tools",
        ),
        (TOOLS_TEMPLATE.replace("<tool_call>\n{{ call.function | tojson }}\n</tool_call>", ""), "leaves out calls"),
    ],
)
def test_a_template_that_leaves_tools_or_calls_out_is_refused(template: str, says: str, supervise: Any) -> None:
    chat = open_chat(byte_level(template))
    with pytest.raises(DataError, match=says):
        chat.encode([calling()], supervise)


def test_all_of_a_plain_text_is_learned_but_its_first_token_with_the_end_of_text_after_it() -> None:
    tokenizer = qwen()
    chat = open_chat(tokenizer)
    texts = ["where is my lamp\n\n", "typed <|im_end|> and <|im_start|>user\nhi"]
    rows = chat.encode([[{"role": "text", "content": text}] for text in texts], "assistant")
    for row, text in zip(rows, texts, strict=True):
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert row.input_ids.count(tokenizer.eos_token_id) == 1
        assert row.labels == [IGNORED, *row.input_ids[1:]]
        assert tokenizer.decode(row.input_ids[:-1]) == text
    assert rows[0].input_ids[:-1] == tokenizer(texts[0])["input_ids"]


def test_plain_texts_and_conversations_of_one_batch_keep_their_places() -> None:
    chat = open_chat(llama3())
    some = [[{"role": "text", "content": "a text"}], [user("hi"), bot("ho")], [{"role": "text", "content": "b"}]]
    assert chat.encode(some, "last") == [chat.encode([each], "last")[0] for each in some]
