"""`regraft data forget`: rows that no future version learns from, and the versions that did.

    1. rows are looked for in what is in data/raw/ now, and in what each version was made from, as far as that is still here
    2. salted hashes of their content (and of the ids that were named) go into data/forget.jsonl, its sha256 into params.yaml;
       `validate` leaves these rows out from then on, whatever file they come in
    3. each version that was trained on one of them gets the tag `regraft.forget`, as does one that went on from such a version;
       it is not promoted again
    4. the command that makes a clean version is told

The rows themselves stay in data/raw/ and in DVC's caches: where they are is told, deleting them is a person's.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.artifacts import canonical_json, digest_file, hold
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, PinMismatch, RegraftError
from regraft.failpoints import failpoint
from regraft.layout import Layout
from regraft.messages import leaves
from regraft.outputs import cache_of, outputs
from regraft.parent import write_values
from regraft.register.clean import present_list
from regraft.register.lookup import versions
from regraft.register.service import Service
from regraft.register.version import CHAMPION, FORGET_TAG, Version
from regraft.settings import Settings
from regraft.validate.forgotten import FORGET, Forgotten, Kind, fresh, load, shape_of

log = logging.getLogger("regraft.forget")
How = Literal["rows", "data", "file", "parent", "unknown", "no"]
_PLACES = 20  # shown
_BATCH = 1_024


@dataclass(frozen=True)
class Seen:
    """One version, and whether it learnt from what is forgotten."""

    number: int
    how: How
    """`rows`: it was trained on such rows. `data`: they were in its data, and which of its data it was trained on is not here
    any more. `file`: a file that holds such rows was in its data. `parent`: it went on from a version that did. `unknown`: what
    it was made from is not here any more. `no`: not one."""
    rows: int
    """Such rows, as far as they could be counted."""
    aliases: tuple[str, ...]

    @property
    def affected(self) -> bool:
        """Whether it gets the tag."""
        return self.how in ("rows", "data", "file", "parent")


@dataclass
class Forgetting:
    """What was found and done."""

    rows: int
    """Rows in data/raw/ now."""
    places: list[str]
    """`file:line` of the first of them."""
    contents: int
    """Different contents and ids on the list that were not on it before."""
    digest: str | None
    """sha256 of the list; None where there is none."""
    versions: list[Seen]
    commands: list[str]
    """What makes a clean version."""
    done: bool
    """False for a dry run."""
    files: list[str] = field(default_factory=list)
    """Files in data/raw/ that hold such rows."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The answer in words."""
        said = [f"{self.rows:,} rows in data/raw/ match" + (f": {', '.join(self.places)}" if self.places else "")]
        if self.rows > len(self.places):
            said[0] += ", ..."
        if self.done:
            said.append(f"{FORGET}: {self.contents} entries more; data.forget in params.yaml names it")
        else:
            said.append(f"dry run: {FORGET} would get {self.contents} entries more; nothing was changed")
        told = {
            "rows": "was trained on {} of them",
            "data": "had {} of them in its data; whether it was trained on them is not known",
            "file": "was made from a file with {} of them",
            "parent": "went on from a version that was",
            "unknown": "is not known: what it was made from is not here any more (`dvc pull` may bring it back)",
            "no": "was not trained on them",
        }
        for each in self.versions:
            alias = f" ({', '.join(each.aliases)})" if each.aliases else ""
            mark = f"; tagged {FORGET_TAG}" if each.affected and self.done else ""
            said.append(f"version {each.number}{alias} {told[each.how].format(each.rows)}{mark}")
        if any(each.affected and CHAMPION in each.aliases for each in self.versions):
            said.append(
                "the champion is one of them: it stays in use until a clean version, which need not be better, replaces it"
            )
        if self.files:
            said.append(f"the rows are still in {', '.join(self.files)}, and older outputs in DVC's cache (`dvc gc`)")
        return [*said, *(f"next: {command}" for command in self.commands)]


def forget(
    layout: Layout, settings: Settings, *, match: str | None, ids: Sequence[str] = (), dry_run: bool = False
) -> Forgetting:
    """Put rows on the list of what is forgotten, and tag the versions that were trained on them; may be repeated.

    Args:
        layout: the clone.
        settings: its parameters.
        match: a regular expression, looked for in all that is said in a row, in its slices and in its id; letter case does not
            count, and `^` and `$` stand for the ends of a line. It is kept nowhere: rows that come later and match are not on the list.
        ids: rows' own names; rows of these names that come later are forgotten, too.
        dry_run: look only.

    Raises:
        ParamsError: neither is given, the expression is none, or `params.yaml` has no line `forget`.
        MissingInput: nothing matches, neither in data/raw/ nor in what versions were made from.
        PinMismatch: the list is not the one that `params.yaml` names, or it names none.
        Busy: another process of this clone is at it.
        ServiceUnavailable: the registry does not answer; the same command can be repeated.
    """
    if match is None and not ids:
        raise ParamsError("nothing to forget was named", fix="`regraft data forget --match PATTERN`, or `--id ID`")
    search = _Search(match, frozenset(ids))
    with hold(layout.lock("forget"), "`regraft data forget`"):
        data = settings.data.model_copy(update={"forget": present_list(layout)})  # another one may have ended since
        return _forget(layout, settings.model_copy(update={"data": data}), search, ids, dry_run=dry_run)


def _forget(layout: Layout, settings: Settings, search: "_Search", ids: Sequence[str], *, dry_run: bool) -> Forgetting:
    shape = shape_of(settings.data)
    listed = _listed(layout, settings.data.forget, shape)
    now = _in_raw(layout, settings, search, listed)
    known = [each for each in versions(settings.register_, layout) if each.complete]
    cache = cache_of(layout)
    found: list[Seen] = []
    contents = now.contents | now.names
    tainted: set[str] = set()
    for version in known:
        lineage = _lineage(version)
        seen, own = _look(layout, cache, version, lineage, search, listed, now)
        contents |= own
        parent = (lineage.get("params", {}).get("train") or {}).get("parent_digest")
        if not seen.affected and parent in tainted:
            seen = Seen(version.number, "parent", 0, version.aliases)
        if seen.affected or FORGET_TAG in version.tags:
            tainted.add(version.adapter_digest)
        found.append(seen)
    new: set[tuple[Kind, str]] = contents | {("id", listed.of_id(each)) for each in ids}
    new = {each for each in new if each not in listed.entries}
    if not contents and not (new or any(each.affected for each in found)):
        raise MissingInput(
            "no row matches, neither in data/raw/ nor in what the versions were made from",
            fix="try the expression with `regraft data forget --dry-run --match ...`; rows of a name: `--id ID`",
        )
    digest = settings.data.forget
    if not dry_run:
        digest = listed.adding(new, shape).save(layout.root / FORGET)
        failpoint("forget.listed")
        if digest != settings.data.forget:
            write_values(layout.params, "data", {"forget": digest})
        failpoint("forget.named")
        _tag(layout, settings, known, found, digest)
    return Forgetting(
        rows=now.rows,
        places=now.places,
        contents=len(new),
        digest=digest,
        versions=found,
        commands=_commands(settings, tainted, found, bool(new)),
        done=not dry_run,
        files=sorted(now.files),
    )


def _listed(layout: Layout, digest: str | None, shape: str) -> Forgotten:
    """Return the list to go on with; a fresh one only where there is none."""
    path = layout.root / FORGET
    if digest is None and path.exists():
        raise PinMismatch(
            f"{FORGET} is there and data.forget in params.yaml is null: its list would be lost",
            fix=f"to go on with it, set data.forget to {digest_file(path)} in params.yaml; to begin anew, move it away",
        )
    return load(path, digest, grown=True) or fresh(shape)


class _Search:
    """What is looked for."""

    def __init__(self, match: str | None, ids: frozenset[str]) -> None:
        try:
            self._pattern = None if match is None else re.compile(match, re.IGNORECASE | re.MULTILINE)
        except re.error as error:
            raise ParamsError(
                f"--match is no regular expression: {error}", fix="write a plain dot or bracket as `\\.` or `\\[`"
            ) from error
        self._ids = ids

    def finds(self, text: str, identity: str | None) -> bool:
        if identity is not None and identity in self._ids:
            return True
        return self._pattern is not None and any(self._pattern.search(each) for each in (text, identity or ""))


@dataclass
class _InRaw:
    """What of it is in data/raw/ now."""

    rows: int = 0
    places: list[str] = field(default_factory=list)
    contents: set[tuple[Kind, str]] = field(default_factory=set)
    names: set[tuple[Kind, str]] = field(default_factory=set)
    """Their own names: they are known by them when they are read in another way."""
    files: dict[str, int] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    """sha256 of each file that is there, with how many rows of it are meant."""
    ids: set[str] = field(default_factory=set)
    """Their row_ids."""
    left_out: str | None = None
    """sha256 of the present list, where all of them are on it: a version made from these files with that list has none of them."""


def _in_raw(layout: Layout, settings: Settings, search: _Search, listed: Forgotten) -> _InRaw:
    from regraft.validate.mapping import row_digests
    from regraft.validate.source import Opened, find_files, read_rows
    from regraft.validate.sources import mappings

    found = _InRaw()
    try:
        files, _ = find_files(settings.data.raw, layout.root)
    except RegraftError as error:  # what was trained on may be gone; the versions are not
        log.info("%s", error.message)
        return found
    longest = 65_536 + 6 * settings.validate_.max_bytes
    read_as = mappings(settings.data, settings.validate_, files, layout.root, longest)
    for file in files:
        opened, before = Opened(), found.rows
        for raw in read_rows(file, longest, opened):
            row = None if raw.record is None else read_as[file.name].row(raw.record)
            if row is None or not search.finds(row.text, row.id):
                continue
            found.rows += 1
            if len(found.places) < _PLACES:
                found.places.append(f"{file.name}:{raw.line}")
            found.contents.update(("content", each) for each in listed.contents_of(row.messages, row.rejected))
            if row.id is not None:
                found.names.add(("id", listed.of_id(row.id)))
            found.ids.add(row_digests(row)[0] if not row.reasons else "")
        if found.rows > before:
            found.files[file.name] = found.rows - before
        found.digests[opened.digest] = found.rows - before
    if found.contents <= listed.entries:
        found.left_out = settings.data.forget
    return found


def _look(
    layout: Layout,
    cache: Path | None,
    version: Version,
    lineage: dict[str, Any],
    search: _Search,
    listed: Forgotten,
    now: _InRaw,
) -> tuple[Seen, set[tuple[Kind, str]]]:
    """Say whether a version was trained on what is looked for; return with it what is listed of those that were in its data."""
    rows = outputs(layout, cache, lineage, "validate", "rows.parquet")
    trained = outputs(layout, cache, lineage, "preprocess", "train_rows-")
    contents: set[tuple[Kind, str]] = set()
    ids = now.ids - {""}
    if rows:
        ids = set()
        for each in _rows(rows[0]):
            other = (each["rejected"],) if each.get("rejected") is not None else ()
            said = "\n".join((*_said(each["messages"]), *other, *(value for _, value in each["slices"] or ())))
            if search.finds(said, each["id"]):
                ids.add(each["row_id"])
                said_in = listed.contents_of(each["messages"], each.get("rejected"))
                contents.update(("content", one) for one in said_in)
                if each["id"] is not None:
                    contents.add(("id", listed.of_id(each["id"])))
    if trained:
        count = sum(_count(path, ids) for path in trained)
        if count or rows:
            return Seen(version.number, "rows" if count else "no", count, version.aliases), contents
    elif rows:
        return Seen(version.number, "data" if ids else "no", len(ids), version.aliases), contents
    left_out = lineage.get("params", {}).get("data", {}).get("forget")
    raw = {entry.get("sha256") for entry in lineage.get("data", {}).get("raw", {}).values()}
    whole = bool(raw) and raw <= set(now.digests)  # else what is there now says nothing of the rest
    if whole and left_out is not None and left_out == now.left_out:
        return Seen(version.number, "no", 0, version.aliases), contents
    count = sum(now.digests.get(digest, 0) for digest in raw)
    if count:
        return Seen(version.number, "file", count, version.aliases), contents
    return Seen(version.number, "no" if whole else "unknown", 0, version.aliases), contents


def _said(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    for each in messages:
        yield each["content"]
        for name in ("tool_calls", "tools"):
            yield from leaves(json.loads(each.get(name) or "[]"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        columns = [
            name for name in ("row_id", "messages", "slices", "id", "rejected") if name in file.schema_arrow.names
        ]
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _count(path: Path, ids: set[str]) -> int:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(_BATCH, columns=["row_id"], use_threads=False)
        return sum(row in ids for batch in batches for row in batch["row_id"].to_pylist())


def _lineage(version: Version) -> dict[str, Any]:
    from regraft.lineage import lineage

    try:
        return lineage(version)
    except (DamagedArtifact, MissingInput) as error:
        log.warning("%s; what it was made from cannot be told", error.message)
        return {}


def _tag(
    layout: Layout, settings: Settings, known: Sequence[Version], found: Sequence[Seen], digest: str | None
) -> None:
    """Tag the versions that are affected; one that says the same already is left as it is."""
    by_number = {each.number: each for each in known}
    service = Service.of(settings.register_, layout, again="regraft data forget")

    def write() -> None:
        for each in found:
            version = by_number[each.number]
            value = canonical_json({"how": each.how, "rows": each.rows, "list": (digest or "")[:16]}).decode()
            if each.affected and FORGET_TAG not in version.tags:
                service.ask("set_model_version_tag", version.name, str(version.number), FORGET_TAG, value)

    if any(each.affected and FORGET_TAG not in by_number[each.number].tags for each in found):
        service.repeated(write)


def _commands(settings: Settings, tainted: set[str], found: Sequence[Seen], new: bool) -> list[str]:
    """Return what makes a clean version; nothing where the champion is one."""
    champion = next((each for each in found if CHAMPION in each.aliases), None)
    if champion is not None and champion.how == "no" and not new:
        return []
    if settings.train.parent is not None and settings.train.parent_digest in tainted:
        return ["regraft parent --none", "regraft retrain"]
    return ["regraft retrain"]
