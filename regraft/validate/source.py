"""Reading raw files row by row, whatever is in them: no row is skipped, and none is held with all others in memory.

A line that cannot be read becomes a row with a reason. Covered: bytes that are not UTF-8, a line without an end, broken
quoting in a CSV (only the broken row is lost to it, not those after it), JSON nested too deep, a file of another format.
"""

import csv
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from regraft.errors import DataError
from regraft.validate.params import Reason
from regraft.validate.raw import RawRow, bounded, has_twice, parse, parsed
from regraft.validate.tables import COMPRESSIONS, Compression, Decompressed, as_bytes, columns_of_table, read_table

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_LEFT_OUT = {"", ".md", ".dvc"}
_LARGEST_JSON = 256_000_000  # bytes; a .json file is one value and must be parsed as a whole
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DataFile:
    """A file to read, its name relative to the clone, and its format (`None`: none that is known)."""

    path: Path
    name: str
    format: Format | None
    compression: Compression | None = None


@dataclass
class Opened:
    """What reading a file to its end tells about it."""

    digest: str = ""
    problem: str | None = None
    columns: list[str] = field(default_factory=list)

    def judge(self, read: int, readable: int) -> None:
        """Take a file for unreadable of which no row could be read."""
        if self.problem is None and not readable:
            self.problem = "it is empty" if not read else f"not one of its {read:,} rows can be read"


def find_files(raw: list[str], root: Path) -> tuple[list[DataFile], list[str]]:
    """Return the files that `data.raw` names, sorted by name, and the names of those left out of folders.

    Raises:
        DataError: an entry names nothing, or there is not one file; all entries concerned are named.
    """
    found: dict[str, DataFile] = {}
    ignored: set[str] = set()
    problems = []
    for entry in raw:
        paths = _expand(root, entry)
        if not paths:
            problems.append(f"`{entry}` is not there" if not _is_glob(entry) else f"`{entry}` matches nothing")
        for path in paths:
            if path.is_dir():
                for each in sorted(path.rglob("*")):
                    if each.is_dir():
                        if each.is_symlink():  # what is in it would be passed over, and DVC does not watch it
                            problems.append(f"`{_name(each, root)}` is a link to a folder: link each file in it")
                        continue
                    hidden = any(part.startswith(".") for part in each.relative_to(path).parts)
                    if hidden or each.suffix.lower() in _LEFT_OUT:
                        ignored.add(_name(each, root))
                    else:
                        found[_name(each, root)] = _data_file(each, root)
            else:
                found[_name(path, root)] = _data_file(path, root)
    fix = f"put {', '.join(FORMATS)} files there, or name another folder below data/raw at `data.raw` in params.yaml"
    if problems:
        raise DataError("data.raw: " + "; ".join(problems), fix=fix)
    if not found:
        raise DataError(f"there is no data file in {', '.join(raw)}", fix=fix)
    return [found[name] for name in sorted(found)], sorted(ignored - set(found))


def stamps(files: Sequence[DataFile]) -> dict[str, tuple[int, ...] | None]:
    """Return of each file what changes when it is written to or replaced; None where a link is broken."""
    found: dict[str, tuple[int, ...] | None] = {}
    for file in files:
        status = file.path.stat() if file.path.exists() else None
        found[file.name] = None if status is None else (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def read_rows(file: DataFile, longest: int, opened: Opened, *, parse: bool = True) -> Iterator[RawRow]:
    """Yield every row of a file, in order; `opened` is filled in by the time of the last one.

    Args:
        file: what to read.
        longest: bytes of a line at most; the rest of a longer one is passed over, and it is `over_long`.
        opened: gets the file's sha256, and its problem where it cannot be read as a whole.
        parse: whether lines of JSON are parsed; else `parsed` is to be called on each row, and `opened.judge` at the end.
    """
    if not file.path.is_file():
        raise DataError(f"{file.name} is not a file", fix="mend the link (`dvc checkout`?), or take it out of data.raw")
    read = 0
    readable = 0
    try:
        with file.path.open("rb", buffering=0) as handle:
            hashing = _Hashing(handle)
            whole: IO[bytes] = io.BufferedReader(hashing, 1 << 20)
            stream = whole
            inner = None if file.compression is None else Decompressed(whole, file.compression)
            if inner is not None:
                stream = io.BufferedReader(inner, 1 << 20)
            rows = _reader(file, stream, longest, opened)
            for row in map(parsed, rows) if parse else rows:
                read += 1
                readable += row.record is not None
                yield row
            if inner is not None and inner.problem is not None:
                opened.problem = inner.problem
            while whole.read(1 << 20):
                pass
            opened.digest = hashing.sha256.hexdigest()
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or error}", fix="check its mode") from error
    if parse:
        opened.judge(read, readable)


def columns_of(file: DataFile, wanted: set[str], longest: int) -> set[str]:
    """Return the columns that a file has, reading only until all that are wanted were seen."""
    if file.format in ("parquet", "arrow"):
        return set(columns_of_table(file.path, file.format))
    seen: set[str] = set()
    opened = Opened()
    rows = read_rows(file, longest, opened)
    for row in rows:
        if opened.columns:
            seen.update(opened.columns)
            break
        if row.record is not None:
            seen.update(row.record)
            if wanted <= seen:
                break
    seen.update(opened.columns)
    rows.close()  # type: ignore[attr-defined]
    return seen


def _reader(file: DataFile, stream: IO[bytes], longest: int, opened: Opened) -> Iterator[RawRow]:
    match file.format:
        case "jsonl":
            return _read_jsonl(stream, longest)
        case "json":
            return _read_json(stream, longest, opened)
        case "csv" | "tsv":
            return _read_csv(stream, longest, opened, "," if file.format == "csv" else "\t")
        case "parquet" | "arrow":
            return _read_table(file, file.format, longest, opened)
        case None:
            opened.problem = f"`{file.path.suffix}` is not a known format; known: {', '.join(FORMATS)}"
            return iter(())


def _read_table(file: DataFile, kind: Literal["parquet", "arrow"], longest: int, opened: Opened) -> Iterator[RawRow]:
    place = 0
    _note_columns(columns_of_table(file.path, kind), opened)
    if file.compression is not None:
        opened.problem = f"a {kind} file is compressed within itself: unpack it"
        return
    try:
        for place, record in enumerate(read_table(file.path, kind), 1):
            yield bounded(RawRow(place, as_bytes(record), record=record), longest)
    except ValueError as error:
        opened.problem = f"after {place:,} rows: {error}"


def _read_jsonl(stream: IO[bytes], longest: int) -> Iterator[RawRow]:
    for line, raw, cut in _lines(stream, longest):
        if cut:
            yield RawRow(line, raw, reason=Reason.OVER_LONG)
        elif not raw.strip():
            yield RawRow(line, raw, reason=Reason.EMPTY_ROW)
        else:
            yield RawRow(line, raw)


def _note_columns(columns: list[str], opened: Opened) -> None:
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        opened.problem = f"it has several columns with one name: {', '.join(twice)}"


def _read_json(stream: IO[bytes], longest: int, opened: Opened) -> Iterator[RawRow]:
    content = stream.read(_LARGEST_JSON + 1)
    if not content:
        return
    if len(content) > _LARGEST_JSON:
        opened.problem = f"it has over {_LARGEST_JSON:,} bytes; write it as .jsonl, a row a line"
        yield RawRow(1, content[:10_000], reason=Reason.OVER_LONG)
        return
    try:
        values = parse(content.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError:
        opened.problem = "it is not UTF-8"
        yield RawRow(1, content[:10_000], reason=Reason.NOT_UTF8)
        return
    except (ValueError, RecursionError) as error:
        opened.problem = f"it is not JSON: {type(error).__name__}"
        yield RawRow(1, content[:10_000], reason=Reason.NOT_JSON)
        return
    if not isinstance(values, list):
        opened.problem = f"it is not a list of rows but {type(values).__name__}"
        yield RawRow(1, content[:10_000], reason=Reason.NOT_JSON)
        return
    for place, value in enumerate(values, 1):
        raw = json.dumps(value).encode()
        if not isinstance(value, dict):
            yield RawRow(place, raw, reason=Reason.NOT_JSON)
        elif has_twice(value):
            yield RawRow(place, raw, reason=Reason.DUPLICATE_KEYS)
        else:
            yield bounded(RawRow(place, raw, record=value), longest)


def _read_csv(stream: IO[bytes], longest: int, opened: Opened, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), longest))  # the process's own: it may only grow
    lines = _Lines(_lines(stream, longest))
    header: list[str] | None = None
    while lines.more():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while lines.more():
            lines.taken.clear()
            try:
                fields = next(reader)
            except (csv.Error, StopIteration):
                fields = None
            number, first, _ = lines.taken[0]
            raw = b"\n".join(raw for _, raw, _ in lines.taken)
            cut = any(cut for _, _, cut in lines.taken)

            if header is None and fields != []:
                header = _header(fields, raw, cut, opened)
                if header:
                    continue
                yield RawRow(number, first, reason=Reason.NOT_CSV)
                lines.give_back()
                break
            if fields is not None and not fields:
                yield RawRow(number, raw, reason=Reason.EMPTY_ROW)
            elif header is None or fields is None or cut or len(fields) != len(header):
                # A quote that is not closed takes in the rows after it: only the first line is given up.
                yield RawRow(number, first, reason=Reason.OVER_LONG if lines.taken[0][2] else Reason.NOT_CSV)
                lines.give_back()
                break
            elif not _is_utf8(raw):
                yield RawRow(number, raw, reason=Reason.NOT_UTF8)
            else:
                yield RawRow(number, raw, record=dict(zip(header, fields, strict=True)))


def _header(fields: list[str] | None, raw: bytes, cut: bool, opened: Opened) -> list[str]:
    """Return a CSV's columns; with none, no later row fits, so all of them are kept as unreadable."""
    if fields is None or cut or not _is_utf8(raw) or not any(fields):
        opened.problem = "its first line cannot be read as the names of columns"
        return []
    opened.columns = list(fields)
    _note_columns(fields, opened)
    return fields


class _Lines:
    """Decoded lines for `csv.reader`, with a note of those that the present row took, which can be given back."""

    def __init__(self, lines: Iterator[tuple[int, bytes, bool]]) -> None:
        self._lines = lines
        self._ahead: deque[tuple[int, bytes, bool]] = deque()
        self.taken: list[tuple[int, bytes, bool]] = []

    def more(self) -> bool:
        """Say whether a line is left."""
        if not self._ahead and (following := next(self._lines, None)) is not None:
            self._ahead.append(following)
        return bool(self._ahead)

    def give_back(self) -> None:
        """Put back all lines of the present row but its first."""
        self._ahead.extendleft(reversed(self.taken[1:]))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.more():
            raise StopIteration
        self.taken.append(self._ahead.popleft())
        return self.taken[-1][1].decode("utf-8", "surrogateescape") + "\n"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _lines(stream: IO[bytes], longest: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yield number, bytes without the line end, and whether the line was longer than `longest` and cut."""
    number = 0
    while raw := stream.readline(longest + 2):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        whole = raw.endswith(b"\n") or len(raw) < longest + 2
        if not whole:
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        yield number, raw.rstrip(b"\r\n"), not whole


class _Hashing(io.RawIOBase):
    """A raw file whose bytes are hashed as they are read, so that the digest is of what was read."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._raw.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        return count


def _data_file(path: Path, root: Path) -> DataFile:
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = Path(path.stem).suffix if compression else path.suffix
    return DataFile(path, _name(path, root), FORMATS.get(suffix.lower()), compression)


def _name(path: Path, root: Path) -> str:
    """Return a path relative to the root where it lies in it, else as it was given.

    Raises:
        DataError: it is not UTF-8: no report could name it.
    """
    name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = name.encode("utf-8", "replace").decode()
            raise DataError(f"the name of {shown} is not UTF-8", fix="rename it") from error
    return name


def _is_glob(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _expand(root: Path, entry: str) -> list[Path]:
    """Return what an entry of `data.raw` names; links are followed, since DVC may check data out as links."""
    if not _is_glob(entry):
        path = root / entry
        return [path] if path.exists() else []
    parts = Path(entry).parts
    fixed = next(place for place, part in enumerate(parts) if _is_glob(part))
    base = root.joinpath(*parts[:fixed])
    paths = sorted(path for path in base.glob("/".join(parts[fixed:])) if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(base).parts)]
