"""Which files are read in which way: the sources of section `data`, each with columns of its own."""

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import DataError, ParamsError
from regraft.validate.mapping import Mapping, check_columns
from regraft.validate.params import OTHER, DataParams, ValidateParams
from regraft.validate.source import DataFile, find_files


def mappings(
    data: DataParams, params: ValidateParams, files: Sequence[DataFile], root: Path, longest: int
) -> dict[str, Mapping]:
    """Return how each file is read, by its name, after a look at the columns of all of them.

    Args:
        data: where rows are and how they are read.
        params: what they must fulfil.
        files: those that `data.raw` names.
        root: the folder that entries are relative to.
        longest: bytes of a line, at most.

    Raises:
        ParamsError: a file is in two sources, or a column is in no file.
        DataError: a source names a file that `data.raw` does not, or files differ in their columns.
    """
    if not data.sources:
        check_columns(data, files, longest)
        return dict.fromkeys((file.name for file in files), Mapping(data, params))
    known = {file.name for file in files}
    owner: dict[str, str] = {}
    for name, source in data.sources.items():
        try:
            found, _ = find_files(source.path, root)
        except DataError as error:
            message = f"data.sources.{name}: {error.message.removeprefix('data.raw: ')}"
            raise DataError(message, fix="put its files there, or take the source out of params.yaml") from error
        if foreign := sorted({file.name for file in found} - known):
            raise DataError(
                f"data.sources.{name} names {', '.join(foreign[:5])}, which data.raw does not",
                fix="add the place to data.raw",
            )
        for file in found:
            if owner.setdefault(file.name, name) != name:
                raise ParamsError(
                    f"{file.name} is in two sources, {owner[file.name]} and {name}: expected in one",
                    fix="name narrower places in data.sources",
                )
    by_file: dict[str, Mapping] = {}
    for name in (*data.sources, OTHER):
        own = [file for file in files if owner.get(file.name, OTHER) == name]
        if own:
            read = data.of_source(name) if name != OTHER else data
            try:
                check_columns(read, own, longest)
            except (ParamsError, DataError) as error:
                raise type(error)(f"in source `{name}`: {error.message}", fix=error.fix) from error
            by_file |= dict.fromkeys((file.name for file in own), Mapping(read, params, source=name))
    return by_file
