from pathlib import Path
from typing import Any

import pytest

from regraft.errors import ParamsError
from regraft.params import load_sections
from regraft.validate.__main__ import Sections
from regraft.validate.params import DataParams


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_sections(path, Sections)


def test_a_list_of_slices_means_columns_of_the_same_name() -> None:
    assert DataParams(slices=["action", "length"]).slices == {"action": "{action}", "length": "{length}"}  # type: ignore[arg-type]


def test_all_mistakes_of_both_sections_are_reported_together(tmp_path: Path) -> None:
    text = "data: {layuot: messages, slices: {a: no column}}\nvalidate: {expectations: {quarantined: {share: 3}}}\n"
    with pytest.raises(ParamsError) as failure:
        read(tmp_path, text)
    assert "has 3 mistakes" in failure.value.message
    assert "data.layuot: unknown parameter; did you mean `layout`?" in failure.value.message
    assert "data.slices.a: found 'no column', expected a template with at least one column" in failure.value.message
    assert "validate.expectations.quarantined.share: found 3, expected less than or equal to 1" in failure.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {layout: prompt_answer, prompt: '{q}'}\nvalidate: {}\n", "`prompt` and `answer` templates"),
        ("data: {prompt: '{q}'}\nvalidate: {}\n", "layout: prompt_answer with the templates"),
        ("data: {}\nvalidate: {labels: {json_field: action}}\n", "`answers_are_json: true` with `labels.json_field`"),
        ("data: {}\nvalidate: {expectations: {reasons: {no_json: {share: 0.1}}}}\n", "expected 'empty_row', "),
        ("data: {}\n", "validate: missing"),
    ],
)
def test_settings_that_contradict_each_other_are_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ParamsError) as failure:
        read(tmp_path, text)
    assert expected in failure.value.message
