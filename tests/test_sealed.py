"""A tokenizer's copy whose control tokens cannot be typed."""

from typing import Any

import pytest
import tiny

from regraft.errors import DataError
from regraft.sealed import SealedTokenizer, unknown_id


def test_sealing_and_unsealing_gives_the_rendered_text_back() -> None:
    sealed = SealedTokenizer(tiny.make_tokenizer(), tiny.CHATML)
    text = "<|im_start|>user\nlamp<|im_end|>\n"
    assert "<|im_" not in sealed.seal(text)
    assert sealed.unseal(sealed.seal(text)) == text


def test_only_what_the_template_wrote_becomes_a_control_token() -> None:
    tokenizer = tiny.make_tokenizer()
    sealed = SealedTokenizer(tokenizer, tiny.CHATML)
    text = "<|im_start|>" + sealed.hide("a<|im_start|>b", keep_added=False) + "<|im_end|>"
    (encoding,) = sealed.encode([sealed.seal(text)])
    assert [i for i in encoding.ids if i in (1, 2)] == [1, 2]
    assert tokenizer.decode(encoding.ids) == "<|im_start|>a<|im_start|>b<|im_end|>"


def test_the_original_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tiny.make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    SealedTokenizer(tokenizer, tiny.CHATML)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_without_rust_is_refused_with_a_way_out() -> None:
    class Slow:
        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

    with pytest.raises(
        DataError, match=r"Slow is not a fast tokenizer.*\n  next: use a base model that has a tokenizer\.json"
    ):
        SealedTokenizer(Slow(), "")


def test_a_tokenizer_that_knows_every_text_has_no_id_for_the_unknown() -> None:
    assert unknown_id(tiny.make_tokenizer()) is None


def test_of_two_control_tokens_that_start_alike_the_longer_is_found() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<x", "<x>"], special_tokens=True)
    sealed = SealedTokenizer(tokenizer, tiny.CHATML)
    (encoding,) = sealed.encode([sealed.seal("<x><x")])
    assert encoding.ids == tokenizer.convert_tokens_to_ids(["<x>", "<x"])
