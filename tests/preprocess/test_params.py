"""The section `preprocess`."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from regraft.errors import ParamsError
from regraft.params import load_sections
from regraft.preprocess.params import PreprocessParams


class Sections(BaseModel):
    preprocess: PreprocessParams


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{block_length: 256}", "expected a `block_length` of at least `max_length` (512), or null"),
        ("{block_length: 1024, packing: false}", "expected no `block_length` where `packing` is false"),
        ("{supervise: none}", "preprocess.supervise: found 'none', expected 'assistant', 'last' or 'all'"),
        ("{holdout: {share: 0.9}}", "preprocess.holdout.share: found 0.9, expected less than or equal to 0.5"),
        ("{maxlength: 8}", "preprocess.maxlength: unknown parameter; did you mean `max_length`?"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"preprocess: {text}\n")
    with pytest.raises(ParamsError) as error:
        load_sections(path, Sections)
    assert message in str(error.value)
