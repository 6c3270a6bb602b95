"""What the README and CONTRIBUTING tell people to type exists, and what they show is valid."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

from regraft import settings
from regraft.cli import command_line
from regraft.errors import Exit
from regraft.layout import Layout
from regraft.params import explain
from regraft.validate.forgotten import FORGET

ROOT = Path(__file__).parent.parent.parent
DOCS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "docs/data.md", "docs/export.md")
}
TEXT = "\n".join(DOCS.values())
TYPED = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
] + re.findall(r"`((?:regraft|make) [^`…]+)`", TEXT)
CLI: Any = typer.main.get_command(command_line())


@pytest.mark.parametrize("line", sorted({line for line in TYPED if line.startswith("regraft ")}))
def test_a_regraft_command_that_is_shown_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    assert words[0] in CLI.commands, f"`regraft {words[0]}` is no command"
    command = CLI.commands[words[0]]
    while hasattr(command, "commands"):
        words = words[1:]
        assert words[0] in command.commands, f"`{line}`: no command {words[0]}"
        command = command.commands[words[0]]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    for word in words[1:]:
        if word.startswith("-"):
            assert word in options, f"`{line}`: no option {word}"


@pytest.mark.parametrize("line", sorted({line for line in TYPED if line.startswith("make ")}))
def test_a_make_target_that_is_shown_exists(line: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert shlex.split(line)[1] in targets


def test_every_command_has_help_for_itself_and_for_each_argument() -> None:
    for name, command in CLI.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_every_parameter_block_in_the_readme_is_valid_on_top_of_the_shipped_one() -> None:
    blocks = re.findall(
        r"```yaml\n(.*?)```", DOCS["README.md"] + DOCS["docs/data.md"] + DOCS["docs/export.md"], flags=re.DOTALL
    )
    assert len(blocks) >= 5
    for block in blocks:
        shipped = YAML(typ="safe").load(ROOT / "params.yaml")
        block = block.replace("<the 40 hexadecimal digits of the commit>", "a" * 40)
        block = block.replace("<its sha256>", "a" * 64)
        for section, values in YAML(typ="safe").load(block).items():
            if section == "data":
                shipped[section] = values
            else:
                shipped[section] = merged(shipped[section], values)
        try:
            settings.Settings.model_validate(shipped)
        except ValueError as error:
            pytest.fail("\n".join([block, *explain(error, settings.Settings)]))  # type: ignore[arg-type]


def merged(old: Any, new: Any) -> Any:
    """`old` with the values of `new`, section by section; an empty mapping empties."""
    if not (isinstance(old, dict) and isinstance(new, dict) and new):
        return new
    return {**old, **{name: merged(old.get(name), value) for name, value in new.items()}}


def test_the_exit_codes_that_are_documented_are_the_ones_in_use() -> None:
    line = re.search(r"0 done or nothing to do.*?checkpoint\.", DOCS["README.md"], flags=re.DOTALL)
    assert line is not None
    documented = {int(code) for code in re.findall(r"(?:^|· ?\n?)(\d) ", line.group())}
    assert documented == {int(code) for code in Exit}


def test_the_paths_in_the_table_of_places_are_the_layouts() -> None:
    layout = Layout()
    for path in (layout.params, layout.work, layout.exports):
        assert f"`{path}" in DOCS["README.md"]
    for path in re.findall(r"`((?:data|regraft|infra|tests|bench)/[\w./*-]+)`", TEXT):
        if not path.startswith(("data/work", "data/exports", FORGET)) and "*" not in path and "STAGE" not in path:
            assert (ROOT / path).exists() or (ROOT / "data" / path).exists(), path
