"""A stage's output as a registered version had it: from the clone, or from DVC's local cache."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from regraft.artifacts import digest_file, read_json
from regraft.errors import RegraftError
from regraft.layout import Layout

log = logging.getLogger("regraft")


def outputs(layout: Layout, cache: Path | None, lineage: dict[str, Any], stage: str, name: str) -> list[Path]:
    """Return the files of a stage's output as the version had it, from the clone or DVC's cache; none where they are gone."""
    data = lineage.get("data", {})
    wanted = (data.get("stages") or {}).get(stage)
    here = layout.stage(stage)
    try:
        if wanted is not None and digest_file(here / "manifest.json") == wanted:
            listed = read_json(here / "manifest.json")["files"]
            files = [(here / each, entry["sha256"]) for each, entry in listed.items() if each.startswith(name)]
            if all(digest_file(path) == digest for path, digest in files):
                return [path for path, _ in files]
    except (RegraftError, OSError, KeyError, TypeError):
        pass  # not here, or another one: looked for in the cache
    outs = ((lineage.get("dvc", {}).get("stages") or {}).get(stage) or {}).get("outs", {})
    folder = outs.get(f"data/work/{stage}")
    if cache is None or not folder:
        return []
    try:
        listed = json.loads((cache / folder[:2] / folder[2:]).read_bytes())
        paths = [(cache / e["md5"][:2] / e["md5"][2:], e["md5"]) for e in listed if e["relpath"].startswith(name)]
        return [path for path, _ in paths] if all(_md5(path) == md5 for path, md5 in paths) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def cache_of(layout: Layout) -> Path | None:
    """Return the folder of DVC's local cache; None where the clone has no DVC."""
    if not (layout.root / ".dvc").is_dir():
        return None
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(layout.root)) as repo:
            return Path(repo.cache.local.path)
    except DvcException as error:
        log.warning("DVC's cache cannot be read: %s", error)
        return None
