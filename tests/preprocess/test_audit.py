"""The audit sees what a wrong mask or wrong tokens would do."""

from dataclasses import replace
from typing import Any

import pytest
import tiny

from regraft.chat import IGNORED, Chat, Rendered, open_chat
from regraft.preprocess.audit import Audit
from regraft.preprocess.report import Supervision

MESSAGES = [{"role": "user", "content": "where is my lamp"}, {"role": "assistant", "content": "track it"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return open_chat(tokenizer)


def audit(tokenizer: Any, row: Rendered, messages: list[dict[str, str]] = MESSAGES) -> Supervision:
    measured = Audit(open_chat(tokenizer), tokenizer)
    measured.add([messages], [row])
    return measured.result(0.0)


def relabelled(row: Rendered, first: int, end: int) -> Rendered:
    labels = [id_ if first <= i < end else IGNORED for i, id_ in enumerate(row.input_ids)]
    return replace(row, labels=labels, answers=[(first, end)])


def test_a_right_mask_gives_full_marks(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    first, end = row.answers[0]
    assert audit(tokenizer, row) == Supervision(
        rows=1,
        tokens=len(row.input_ids),
        trained_tokens=end - first,
        answers=1,
        rows_training_nothing=0,
        rows_learning_to_stop=1,
        answers_recovered=1,
        answers_exact=1,
        round_trip=1,
        agreement=1,
        agreement_rows=1,
        kept_apart=0,
        control_text=0,
        control_leaked=0,
        unknown_tokens=0,
        truncated=0,
        longest=len(row.input_ids),
        dropped_share=0,
    )


def test_a_mask_without_the_stop_token_does_not_learn_to_stop(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    first, end = row.answers[0]
    found = audit(tokenizer, relabelled(row, first, end - 1))
    assert (found.rows_learning_to_stop, found.answers_recovered, found.answers_exact) == (0, 1, 0)


def test_a_mask_that_starts_late_does_not_recover_the_answer(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    first, end = row.answers[0]
    found = audit(tokenizer, relabelled(row, first + 1, end))
    assert (found.rows_learning_to_stop, found.answers_recovered, found.answers_exact) == (1, 0, 0)


def test_a_mask_that_learns_the_header_is_not_exact(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    first, end = row.answers[0]
    found = audit(tokenizer, relabelled(row, first - 1, end + 1))
    assert (found.rows_learning_to_stop, found.answers_recovered, found.answers_exact) == (0, 1, 0)


def test_an_empty_mask_trains_nothing(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    found = audit(tokenizer, relabelled(row, 5, 5))
    assert (found.rows_training_nothing, found.trained_tokens, found.rows_learning_to_stop) == (1, 0, 0)


def test_a_control_token_that_was_let_through_is_counted(tokenizer: Any, chat: Chat) -> None:
    messages = [{"role": "user", "content": "say <|im_end|>"}, MESSAGES[1]]
    (row,) = chat.encode([messages], "assistant")
    assert (audit(tokenizer, row, messages).control_text, audit(tokenizer, row, messages).control_leaked) == (1, 0)
    naive = tokenizer.apply_chat_template(messages)["input_ids"]
    assert audit(tokenizer, replace(row, input_ids=naive), messages).control_leaked == 1


def test_tokens_that_are_not_those_of_the_text_neither_agree_nor_come_back(tokenizer: Any, chat: Chat) -> None:
    (row,) = chat.encode([MESSAGES], "assistant")
    found = audit(tokenizer, replace(row, input_ids=[*row.input_ids[:3], row.input_ids[2], *row.input_ids[3:]]))
    assert (found.agreement, found.round_trip) == (0, 0)


def test_text_that_the_tokenizer_does_not_know_is_counted() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[S]", "[E]", "user", "assistant", "where", "is", "it", "here"]
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = tiny.CHATML.replace("<|im_start|>", "[S] ").replace("<|im_end|>", " [E]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="[UNK]", eos_token="[E]", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["[S]"]})
    messages = [{"role": "user", "content": "where is xyzzy or plugh or foo"}, {"role": "assistant", "content": "here"}]
    (row,) = open_chat(tokenizer).encode([messages], "assistant")
    found = audit(tokenizer, row, messages)
    assert (found.unknown_tokens, found.control_leaked, found.round_trip) == (5, 0, 0)
