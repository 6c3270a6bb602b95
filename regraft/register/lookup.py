"""Finding versions fast: plain SQL on a SQLite store (milliseconds), MLflow's client on any other (seconds).

Reading tells what is there and never changes it: no store, file or model is created.
"""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from regraft.errors import DamagedArtifact, MissingInput, ParamsError, ServiceUnavailable
from regraft.layout import Layout
from regraft.register.params import RegisterParams
from regraft.register.store import connect, found_source, sqlite_file, store_uri
from regraft.register.version import CHALLENGER, CHAMPION, LEDGER, Entry, Version, masked

_T = TypeVar("_T")
_DELETED = "Deleted_Internal"  # `current_stage` of a deleted version: MLflow keeps its row


def champion(params: RegisterParams, layout: Layout) -> Version | None:
    """Return the version in use, None where there is none yet.

    Raises:
        ServiceUnavailable: the store does not answer; that is not the same as having no champion.
    """
    return by_alias(params, layout, CHAMPION)


def challenger(params: RegisterParams, layout: Layout) -> Version | None:
    """Return the version that was registered last."""
    return by_alias(params, layout, CHALLENGER)


def by_alias(params: RegisterParams, layout: Layout, alias: str) -> Version | None:
    """Return the version that carries an alias."""
    return next((each for each in versions(params, layout) if alias in each.aliases), None)


def version(params: RegisterParams, layout: Layout, which: str | int) -> Version:
    """Return one version.

    Args:
        params: the section `register`.
        layout: the clone.
        which: a version number, an alias (`champion`), or the first 8 or more characters of an identity.

    Raises:
        MissingInput: there is no such version; the message lists the ones there are.
        ParamsError: two identities begin with these characters.
    """
    return pick(versions(params, layout), which, params.model_name)


def pick(known: list[Version], which: str | int, name: str) -> Version:
    """Return the version that `which` names, as `version` does, of those known."""
    wanted = str(which)
    if wanted.isdecimal() and len(wanted) < 8:
        found = [each for each in known if each.number == int(wanted)]
    else:
        found = [each for each in known if wanted in each.aliases]
        if not found and len(wanted) >= 8:
            found = [each for each in known if each.identity.startswith(wanted)]
    if len(found) > 1:
        raise ParamsError(f"{wanted} names versions {', '.join(str(each.number) for each in found)}: give more of it")
    if not found:
        listed = ", ".join(str(each.number) + "".join(f" ({a})" for a in each.aliases) for each in known)
        raise MissingInput(f"{name} has no version {wanted}; it has {listed or 'none yet'}", fix="regraft retrain")
    return found[0]


def versions(params: RegisterParams, layout: Layout) -> list[Version]:
    """Return all versions, oldest first; those that other tools made are among them, with `complete` False."""
    uri = store_uri(params, layout)

    def by_sql(store: sqlite3.Connection) -> list[Version]:
        aliases: dict[int, list[str]] = {}
        for alias, number in store.execute(
            "SELECT alias, version FROM registered_model_aliases WHERE name = ? ORDER BY alias", (params.model_name,)
        ):
            aliases.setdefault(number, []).append(alias)
        tags: dict[int, dict[str, str]] = {}
        for number, key, value in store.execute(
            "SELECT version, key, value FROM model_version_tags WHERE name = ?", (params.model_name,)
        ):
            tags.setdefault(number, {})[key] = value
        rows = store.execute(
            "SELECT version, source, run_id, creation_time FROM model_versions"
            " WHERE name = ? AND current_stage IS NOT ? ORDER BY version",
            (params.model_name, _DELETED),
        )
        return [
            Version(
                name=params.model_name,
                number=number,
                uri=uri,
                source=found_source(uri, source),
                run_id=run_id or "",
                created_ms=created,
                tags=tags.get(number, {}),
                aliases=tuple(aliases.get(number, ())),
            )
            for number, source, run_id, created in rows
        ]

    def by_client() -> list[Version]:
        from regraft.register.service import Service

        return Service.of(params, layout).versions(params.model_name)

    return _read(uri, by_sql, by_client, [])


def ledger(params: RegisterParams, layout: Layout) -> list[Entry]:
    """Return every change of the champion, oldest first."""

    def by_sql(store: sqlite3.Connection) -> list[Entry]:
        rows = store.execute(
            "SELECT key, value FROM registered_model_tags WHERE name = ? AND substr(key, 1, ?) = ?",
            (params.model_name, len(LEDGER), LEDGER),
        )
        return entries(dict(rows))

    def by_client() -> list[Entry]:
        from regraft.register.service import Service

        model = Service.of(params, layout).model(params.model_name)
        return [] if model is None else entries(model.tags)

    return _read(store_uri(params, layout), by_sql, by_client, [])


def entries(tags: dict[str, str]) -> list[Entry]:
    """Read the ledger out of a registered model's tags.

    Raises:
        DamagedArtifact: an entry is not one, or one is missing between others.
    """
    found = []
    for key, value in sorted(tags.items()):
        if key.startswith(LEDGER):
            found.append(entry(value))
    if [each.number for each in found] != list(range(1, len(found) + 1)):
        raise DamagedArtifact(f"the ledger has gaps: its entries are {[each.number for each in found]}")
    return found


def entry(value: str) -> Entry:
    """Read one entry from its JSON."""
    try:
        return Entry(**json.loads(value))
    except (TypeError, ValueError) as error:
        raise DamagedArtifact(f"an entry of the ledger is unreadable: {value[:100]!r}") from error


def _read(uri: str, by_sql: Callable[[sqlite3.Connection], _T], by_client: Callable[[], _T], nothing: _T) -> _T:
    """Ask a SQLite file directly; any other store, and a schema that has changed, through MLflow."""
    file = sqlite_file(uri)
    if file is None:
        return by_client()
    if not file.exists() or file.stat().st_size == 0:
        return nothing
    try:
        with closing(connect(file)) as store:
            return by_sql(store)
    except sqlite3.OperationalError as error:
        if "no such" in str(error):
            return by_client()
        raise ServiceUnavailable(f"{masked(uri)} cannot be read: {error}", fix="run the same command again") from error
    except sqlite3.DatabaseError as error:
        raise DamagedArtifact(f"{file} is not a SQLite database: {error}") from error
