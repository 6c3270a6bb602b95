"""The adapter that the next training goes on from: fetched from the registry, and written into `params.yaml`.

A stage reads no registry: what a warm start takes from it is resolved here, before the stages start.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from regraft.artifacts import write_file
from regraft.errors import ParamsError
from regraft.layout import Layout
from regraft.model.check import check_adapter
from regraft.params import PARAMS_FILE
from regraft.register.fetch import fetch
from regraft.register.lookup import version
from regraft.settings import Settings

FOLDER = Path("data/parents")
"""Parents, each in a folder named by its identity; a clone can fetch them again."""


@dataclass(frozen=True)
class Parent:
    """What training goes on from; both are None for a fresh start."""

    number: int | None
    adapter: str | None
    digest: str | None


def set_parent(layout: Layout, settings: Settings, which: str | None) -> Parent:
    """Make a version the parent of the next training, or nothing.

    Args:
        layout: the clone.
        settings: its parameters.
        which: a number, an alias or the start of an identity; None for a fresh start.

    Raises:
        MissingInput: there is no such version, or the registry has lost its files.
        DamagedArtifact: its files are not the registered ones, or no adapter that may be loaded.
        ParamsError: `params.yaml` has no line for it.
    """
    if which is None:
        write_values(layout.params, "train", {"parent": "null", "parent_digest": "null"})
        return Parent(None, None, None)
    found = version(settings.register_, layout, which)
    folder = FOLDER / found.identity[:16]
    fetch(found, folder)
    digest = check_adapter(folder / "adapter").digest
    adapter = (folder / "adapter").as_posix()
    write_values(layout.params, "train", {"parent": adapter, "parent_digest": digest})
    return Parent(found.number, adapter, digest)


def write_values(file: Path, section: str, values: dict[str, str]) -> None:
    """Change values of a section of `params.yaml`, and nothing else of the file: comments and order stay.

    Raises:
        ParamsError: the section has no line of its own for one of them.
    """
    before, mark, body = ("\n" + file.read_text(encoding="utf-8")).partition(f"\n{section}:\n")
    end = re.search(r"^\S", body, flags=re.MULTILINE)
    body, after = (body[: end.start()], body[end.start() :]) if end else (body, "")
    for key, value in values.items():
        old = rf"^(  {key}:)(?: +[^\s#]\S*)?(?=\s|$)"  # with a value or without, a comment behind it or none
        body, changes = re.subn(old, rf"\g<1> {value}", body, flags=re.MULTILINE)
        if changes != 1:
            fix = f"add `  {key}: null` to {section}"
            raise ParamsError(f"{PARAMS_FILE}: {section}.{key} has no line of its own", fix=fix)
    write_file(file, (before + mark + body + after)[1:].encode())
