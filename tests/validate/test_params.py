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


@pytest.mark.parametrize(
    "place", ["data/later", "/data/raw/a.csv", "data/raw/../later", "data/raw/*/../../later", "data/ra*", "data/rawer"]
)
def test_places_that_dvc_does_not_watch_are_refused_in_a_clone_and_the_message_says_why(
    tmp_path: Path, place: str
) -> None:
    with pytest.raises(ParamsError) as failure:
        read(tmp_path, f"data: {{raw: [data/raw, '{place}']}}\nvalidate: {{}}\n")
    assert "data.raw: found" in failure.value.message
    assert "DVC looks only there for new data" in failure.value.message
    assert f"(`{place}`); put the files, or a link to each file, into data/raw" in failure.value.message


def test_places_in_the_folder_that_dvc_watches_are_taken_as_they_are_written(tmp_path: Path) -> None:
    places = ["data/raw", "./data/raw/2026", "data/raw//a.csv", "data/raw/**/*.csv"]
    assert read(tmp_path, f"data: {{raw: {places}}}\nvalidate: {{}}\n").data.raw == places
