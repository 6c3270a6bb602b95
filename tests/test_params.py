"""params.yaml: every mistake at once, each with its path, what was found and what was expected."""

import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from regraft.errors import ParamsError
from regraft.params import Section, load_sections, read_yaml


class Inner(Section):
    bits: Literal[4, 8, 16] = 4
    kind: Literal["nf4", "fp4"] = "nf4"


class Train(Section):
    learning_rate: float = Field(default=1e-4, gt=0)
    rank: int = Field(default=8, ge=1)
    inner: Inner | None = None


class Model(Section):
    train: Train
    validate_: Inner | None = Field(default=None, alias="validate")


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    assert load_sections(write(tmp_path, "train: {learning_rate: 2e-4}\n"), Model).train.learning_rate == 2e-4


def test_a_stage_does_not_read_other_sections_but_the_whole_file_is_checked_by_a_command(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {}\nexport: {x: 1}\n")
    assert load_sections(path, Model).train.rank == 8
    with pytest.raises(ParamsError, match=r"export: unknown parameter; known here: train, validate"):
        load_sections(path, Model, only=False)


def test_all_mistakes_are_reported_at_once_with_path_value_and_expectation(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  learnig_rate: 1\n  rank: 0\n  inner: {bits: 5, knd: 1}\nvalidate: {bits: x}\n")
    with pytest.raises(ParamsError) as caught:
        load_sections(path, Model)
    assert caught.value.message == (
        f"{path} has 5 mistakes:\n"
        "  train.rank: found 0, expected greater than or equal to 1\n"
        "  train.inner.bits: found 5, expected 4, 8 or 16\n"
        "  train.inner.knd: unknown parameter; did you mean `kind`?\n"
        "  train.learnig_rate: unknown parameter; did you mean `learning_rate`?\n"
        "  validate.bits: found 'x', expected 4, 8 or 16"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\n", "not YAML"),
        ("- 1\n", "expected sections like"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: &x 1\nb: *x\n", r"line 2: YAML aliases \(\*x\)"),
        ("a: !!python/object/apply:os.system [echo]\n", "not YAML"),
        ("a: " + "[" * 3000, "not YAML"),
    ],
)
def test_what_is_not_a_plain_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ParamsError, match=says):
        read_yaml(write(tmp_path, text))


def test_a_bomb_of_aliases_is_refused_in_under_a_second(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    began = time.monotonic()
    with pytest.raises(ParamsError, match="aliases"):
        read_yaml(write(tmp_path, "\n".join(lines)))
    assert time.monotonic() - began < 1


def test_a_missing_or_foreign_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="is missing"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ParamsError, match="not UTF-8"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: 1\n" * 300_000)
    with pytest.raises(ParamsError, match="expected at most 1000000"):
        read_yaml(tmp_path / "params.yaml")
