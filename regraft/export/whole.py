"""Whether a folder is a whole export, or a whole merge: every byte, offline, wherever it lies."""

from pathlib import Path

from regraft.errors import DamagedArtifact, MissingInput
from regraft.export.certificate import CERTIFICATE, verify_export
from regraft.export.report import Certificate
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
        return verify_export(folder) if (folder / CERTIFICATE).is_file() else verify_merge(folder)
    except MissingInput as error:
        raise MissingInput(
            error.message, fix=error.fix or "name an export, or a folder that `regraft merge` made"
        ) from error
    except DamagedArtifact as error:
        fix = error.fix or "copy it again from where it was made; there, `regraft export` makes a damaged export anew"
        raise DamagedArtifact(error.message, fix=fix) from error
