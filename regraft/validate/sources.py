"""Which files are read in which way: the sources of section `data`, each with columns of its own."""

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import DataError, ParamsError
from regraft.validate.layouts import detect
from regraft.validate.mapping import Mapping, check_columns
from regraft.validate.params import OTHER, DataParams, ValidateParams
from regraft.validate.source import DataFile, Opened, find_files, read_rows


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
        return _told(dict.fromkeys((file.name for file in files), Mapping(data, params)), files, longest)
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
    return _told(by_file, files, longest)


def _told(by_file: dict[str, Mapping], files: Sequence[DataFile], longest: int) -> dict[str, Mapping]:
    """Find out whether the rows are preferences; with `auto` the first row of each file tells.

    Raises:
        DataError: some files hold preferences and others conversations.
    """
    told: dict[bool, list[str]] = {True: [], False: []}
    for file in files:
        layout = by_file[file.name].data.layout
        if layout == "auto":
            rows = () if file.format is None else read_rows(file, longest, Opened())
            record = next((row.record for row in rows if row.record is not None), None)
            found = None if record is None else detect(record, record)
            if found is None:
                continue
            layout = found[0]
        told[layout == "preference"].append(file.name)
    if told[True] and told[False]:
        raise DataError(
            f"{', '.join(told[True][:5])}: preferences; {', '.join(told[False][:5])}: conversations without; expected "
            "one kind",
            fix="keep them in clones of their own: an adapter of the one can be train.parent of the other",
        )
    for mapping in by_file.values():
        mapping.preferences = bool(told[True])
    return by_file
