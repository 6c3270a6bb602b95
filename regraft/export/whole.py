"""Whether a folder is a whole export, or a whole merge: every byte, offline, wherever it lies."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from regraft.artifacts import MANIFEST, read_json
from regraft.errors import DamagedArtifact, MissingInput
from regraft.export.certificate import CERTIFICATE, verify_export
from regraft.export.report import Certificate, FileEntry
from regraft.export.standalone import MergeRecord, verify_merge


def verify_folder(folder: Path) -> Certificate | MergeRecord:
    """Check an export or what `regraft merge` made; nothing is loaded.

    Returns:
        The certificate of an export, the record of a merge.

    Raises:
        MissingInput: it is neither, or not a whole one.
        DamagedArtifact: something differs; the message names all of it.
    """
    try:
        _check_manifest(folder)
        return verify_export(folder) if (folder / CERTIFICATE).is_file() else verify_merge(folder)
    except MissingInput as error:
        raise MissingInput(
            error.message, fix=error.fix or "name an export, or a folder that `regraft merge` made"
        ) from error
    except DamagedArtifact as error:
        fix = error.fix or "copy it again from where it was made; there, `regraft export` makes a damaged export anew"
        raise DamagedArtifact(error.message, fix=fix) from error


class _Manifest(BaseModel):
    files: dict[str, FileEntry]


def _check_manifest(folder: Path) -> None:
    """Look at a manifest's form, which whoever sent the folder may have written: its bytes are compared afterwards."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        _Manifest.model_validate(read_json(folder / MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DamagedArtifact(
            f"{folder / MANIFEST} is no manifest: {where}: {first['msg']}", fix="copy it again from where it was made"
        ) from error
