"""Whether an adapter is free of what is to be forgotten: by the list that it was made with, and by what it went on from.

`regraft data forget` tags the versions that are there when it runs. One that is registered later has no tag, and may still be
tainted: it went on from a tagged one, or its data was validated before the list got longer.
"""

from collections.abc import Sequence
from logging import getLogger
from typing import Any

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.layout import Layout
from regraft.lineage import lineage
from regraft.params import read_yaml
from regraft.register.version import FORGET_TAG, LIST_TAG, Version

log = getLogger("regraft.register")


def present_list(layout: Layout) -> str | None:
    """Return `data.forget` as `params.yaml` has it at this moment, not when a command began."""
    if not layout.params.is_file():
        return None
    return _text((read_yaml(layout.params).get("data") or {}).get("forget"))


def list_of_stages(layout: Layout) -> str | None:
    """Return the `data.forget` that `validate` ran with, by `dvc.lock`; without one, the present one."""
    try:
        stages = read_yaml(layout.root / "dvc.lock").get("stages") or {}
        ran = stages["validate"]["params"][layout.params.name]
        return _text(ran["data"].get("forget") if "data" in ran else ran["data.forget"])
    except (ParamsError, MissingInput, OSError, KeyError, TypeError, AttributeError):
        return present_list(layout)


def tainted_ancestor(parent: str | None, known: Sequence[Version]) -> Version | None:
    """Return the tagged version that training went on from, at however many removes; None where there is none.

    Args:
        parent: digest of the adapter that training began with; None for a fresh start.
        known: all versions.
    """
    if not any(FORGET_TAG in each.tags for each in known):
        return None
    todo, seen = [parent], set[str]()
    while todo:
        digest = todo.pop()
        if not digest or digest in seen:
            continue
        seen.add(digest)
        for version in known:
            if version.complete and version.adapter_digest == digest:
                if FORGET_TAG in version.tags:
                    return version
                todo.append(_parent(version))
    return None


def ancestor_of(version: Version, known: Sequence[Version]) -> Version | None:
    """Return the tagged version that a version went on from, see `tainted_ancestor`.

    Raises:
        DamagedArtifact, MissingInput: its lineage cannot be read, so nobody knows what it went on from.
    """
    return tainted_ancestor(_text(_section(lineage(version), "train").get("parent_digest")), known)


def taint(version: Version, known: Sequence[Version], layout: Layout, *, by_list: bool = True) -> str | None:
    """Say what of a version is to be forgotten; None where nothing is.

    Args:
        version: one that Regraft registered.
        known: all versions.
        layout: the clone, whose `params.yaml` names the present list.
        by_list: also ask whether it was made with the present list.
    """
    if FORGET_TAG in version.tags:
        return f"was trained on rows that are to be forgotten ({FORGET_TAG}: {version.tags[FORGET_TAG]})"
    if not version.complete:
        return None
    if any(FORGET_TAG in each.tags for each in known):
        ancestor = ancestor_of(version, known)
        if ancestor is not None:
            return f"went on from version {ancestor.number}, which was trained on rows that are to be forgotten"
    present = present_list(layout) if by_list else None
    if present is None:
        return None
    made_with = version.tags.get(LIST_TAG) or _text(_section(lineage(version), "data").get("forget"))
    if made_with == present:
        return None
    was = f"the list {made_with[:16]}" if made_with else "no list"
    return f"was made with {was} of rows to be forgotten, and data.forget names {present[:16]} now"


def _parent(version: Version) -> str | None:
    try:
        return _text(_section(lineage(version), "train").get("parent_digest"))
    except (DamagedArtifact, MissingInput) as error:
        log.warning("%s; what it went on from cannot be told", error.message)
        return None


def _section(found: dict[str, Any], name: str) -> dict[str, Any]:
    return (found.get("params") or {}).get(name) or {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
