"""Which store a clone uses, without importing mlflow."""

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from regraft.errors import ParamsError
from regraft.layout import Layout
from regraft.register.params import RegisterParams, check_uri
from regraft.register.version import local_folder, masked

ARTIFACTS = "mlartifacts"
"""Folder of artefacts beside a SQLite store; `mlruns` would be MLflow's abandoned file store."""


def store_uri(params: RegisterParams, layout: Layout) -> str:
    """Return the store's URI: MLFLOW_TRACKING_URI, else `register.tracking_uri`; SQLite paths made absolute.

    Raises:
        ParamsError: the environment variable names something that cannot keep versions.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking_uri
    try:
        check_uri(uri)
    except ValueError as error:
        raise ParamsError(
            f"MLFLOW_TRACKING_URI: found {masked(uri)!r}, expected {error}", fix="unset or correct MLFLOW_TRACKING_URI"
        ) from error
    scheme, separator, path = uri.partition(":///")
    if separator and scheme.startswith("sqlite"):
        return f"{scheme}:///{layout.root.resolve() / path}"
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store (its URI absolute already), None for other stores."""
    scheme, separator, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if separator and scheme.startswith("sqlite") else None


def artifact_root(uri: str) -> Path | None:
    """Return where a SQLite store's artefacts lie; None where a server decides."""
    file = sqlite_file(uri)
    return None if file is None else file.parent / ARTIFACTS


def found_source(uri: str, source: str) -> str:
    """Return where a version's files are now: MLflow records absolute paths, which a moved clone leaves behind."""
    folder, root = local_folder(source), artifact_root(uri)
    if folder is None or root is None or folder.is_dir() or ARTIFACTS not in folder.parts:
        return source
    last = len(folder.parts) - 1 - folder.parts[::-1].index(ARTIFACTS)
    moved = root.joinpath(*folder.parts[last + 1 :])
    return str(moved) if moved.is_dir() else source


def connect(file: Path) -> sqlite3.Connection:
    """Open a SQLite store for reading; it is never created, and a writer is waited for at most 5 s."""
    return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=5)
