"""Talking to MLflow: bounded in time, quiet, and with one kind of error for "it does not answer".

MLflow retries a call seven times by itself, 248 s in all, and repeats calls that are not idempotent: a version whose
answer was lost would be created twice. Here a call is made once; `repeated` repeats whole operations, each of which
first looks at what is there already.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

from regraft.artifacts import hold
from regraft.errors import Busy, DamagedArtifact, MissingInput, RegraftError, ServiceUnavailable
from regraft.layout import Layout
from regraft.register.params import RegisterParams
from regraft.register.store import artifact_root, found_source, sqlite_file, store_uri
from regraft.register.version import Version, local_folder, masked

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TRANSIENT = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}
)
_COLLISIONS = ("IntegrityError", "UniqueViolation", "Duplicate entry")
LOCK_PATIENCE = 300.0
"""Seconds for which another live process of this machine is waited for: it may be uploading. A dead one holds no lock."""
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts; then the last again


class Answer(RegraftError):
    """MLflow answered, with an error; `code` is its name for it, such as RESOURCE_ALREADY_EXISTS."""

    code: str = ""


class Service:
    """MLflow's client for one store.

    Creating one does nothing; the first call imports mlflow (about 2 s) and makes a SQLite store where there is none.
    """

    def __init__(self, uri: str, *, timeout: int = 10, patience: float = 30, again: str = "regraft status") -> None:
        """Prepare.

        Args:
            uri: absolute, see `store_uri`.
            timeout: seconds without an answer after which a call is given up.
            patience: seconds since the first unanswered question after which no further call or attempt is started;
                time spent elsewhere, such as on hashing files between two answers, does not count.
            again: the command to run when the service answers again.
        """
        self.uri = uri
        self.timeout = timeout
        self.patience = patience
        self.again = again
        self._since: float | None = None  # the first question since the last answer; None while none is open

    @classmethod
    def of(cls, params: RegisterParams, layout: Layout, *, again: str = "regraft status") -> "Service":
        """The service that `params.yaml` (or MLFLOW_TRACKING_URI) names."""
        return cls(store_uri(params, layout), timeout=params.timeout, patience=params.patience, again=again)

    @cached_property
    def client(self) -> Any:
        """The `MlflowClient`."""
        prepare_mlflow(self.timeout)
        if (file := sqlite_file(self.uri)) is not None:
            initialise(file)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the client once.

        Raises:
            ServiceUnavailable: no answer in time, or one that says so; whether the call had an effect is unknown.
            Answer: MLflow refused the call; it had no effect.
        """
        with self._translated():
            client = self.client  # the import and a new store take their time once, outside the patience
            if self._since is None:
                self._since = time.monotonic()
            if time.monotonic() - self._since > self.patience:
                raise self.unavailable(f"no useful answer for {self.patience:g} s")
            answer = getattr(client, method)(*args, **kwargs)
        self._since = None
        return answer

    def transfer(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Upload or download: as `ask`, for as long as something moves; it ends when nothing does for `timeout`."""
        with self._translated():
            answer = function(*args, **kwargs)
        self._since = None
        return answer

    def read_back(self, location: str, check: Callable[[Path], None]) -> None:
        """Give the files at an artefact location to `check`: where they are, or downloaded for it."""
        local = local_folder(location)
        if local is not None:
            check(local)
            return
        with tempfile.TemporaryDirectory(prefix="regraft-") as temporary:
            check(self.download(location, "", Path(temporary)))

    def upload(self, location: str, folder: str, name: str, data: bytes) -> None:
        """Write one file, `folder`/`name`, into an artefact location of the server."""
        with tempfile.TemporaryDirectory(prefix="regraft-") as temporary:
            path = Path(temporary) / name
            path.write_bytes(data)
            self.transfer(self._artifacts(location).log_artifact, str(path), folder)

    def download(self, source: str, name: str, to: Path) -> Path:
        """Download the folder `source`, or the file `name` in it, into the folder `to`.

        Raises:
            MissingInput: the store answers that it has no such file.
            ServiceUnavailable: it does not answer.
        """
        repository = self._artifacts(source)
        if name:
            found = self.transfer(repository.list_artifacts, str(PurePosixPath(name).parent).removeprefix("."))
            if name not in {each.path for each in found}:
                raise MissingInput(f"{masked(self.uri)} has no {source.rstrip('/')}/{name}")
        return Path(self.transfer(repository.download_artifacts, name, str(to)))

    def _artifacts(self, location: str) -> Any:
        """MLflow's repository for an artefact location."""
        prepare_mlflow(self.timeout)
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(location, tracking_uri=self.uri)

    def restart_clock(self) -> None:
        """Give the next questions the whole patience again."""
        self._since = None

    def repeated(self, operation: Callable[[], _T]) -> _T:
        """Run an idempotent operation, and again for `patience` seconds after it first failed for want of an answer."""
        failed: float | None = None
        for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
            try:
                return operation()
            except ServiceUnavailable:
                failed = failed or time.monotonic()
                if time.monotonic() + pause > failed + self.patience:
                    raise
                time.sleep(pause)
        raise AssertionError("the pauses never end")

    def unavailable(self, problem: str) -> ServiceUnavailable:
        """The error that names the service, the problem and what to do."""
        where = "is there and writable" if sqlite_file(self.uri) else "runs and MLFLOW_TRACKING_URI is right"
        return ServiceUnavailable(
            f"MLflow at {masked(self.uri)} is not available: {problem}",
            fix=f"see that it {where}, then run `{self.again}` (again): nothing is done twice",
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        prepare_mlflow(self.timeout)
        from mlflow.exceptions import MlflowException, RestException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except MlflowException as error:
            told = isinstance(error, RestException) or not self.uri.startswith("http")
            short = str(error).splitlines()[0][:300]
            if "out-of-date database schema" in short:
                raise RegraftError(
                    f"{masked(self.uri)} was made by another version of MLflow: {short}",
                    fix=f"back it up, then `mlflow db upgrade {masked(self.uri)}`",
                ) from error
            # MLflow sets tags and aliases by looking first and inserting then: of two at once, one violates a constraint.
            collided = any(sign in str(error) for sign in _COLLISIONS)
            if error.error_code in _TRANSIENT or collided or not told:
                raise self.unavailable(short) from error
            self._since = None
            answer = Answer(f"MLflow at {masked(self.uri)} refused: {short}")
            answer.code = error.error_code
            raise answer from error
        except (RequestException, SQLAlchemyError) as error:
            raise self.unavailable(str(error).splitlines()[0][:300]) from error
        except (ConnectionError, TimeoutError) as error:
            if isinstance(error, RegraftError):
                raise
            raise self.unavailable(str(error)) from error
        except OSError as error:
            if isinstance(error, RegraftError):
                raise
            place = artifact_root(self.uri) or masked(self.uri)
            raise RegraftError(
                f"{place} cannot be used: {error.strerror or error}",
                fix=f"check its owner, mode and free space, then run `{self.again}` again",
            ) from error

    # What the registry holds

    def model(self, name: str) -> Any:
        """Return the registered model (tags, aliases), None where there is none."""
        try:
            return self.ask("get_registered_model", name)
        except Answer as answer:
            if answer.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def versions(self, name: str, identity: str | None = None, *, model: Any = None) -> list[Version]:
        """Return the versions of a model (`model`, if it was read already), or those of one identity, oldest first."""
        model = model or self.model(name)
        if model is None:
            return []
        query = f"name = '{name}'" + (f" and tag.`regraft.identity` = '{identity}'" if identity else "")
        found, token = [], None
        while True:
            page = self.ask("search_model_versions", query, max_results=1000, page_token=token)
            found += [self.version_of(each, model.aliases) for each in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda each: each.number)

    def version_of(self, found: Any, aliases: dict[str, str]) -> Version:
        """Turn MLflow's record into ours."""
        number = int(found.version)
        return Version(
            name=found.name,
            number=number,
            uri=self.uri,
            source=found_source(self.uri, found.source),
            run_id=found.run_id or "",
            created_ms=found.creation_timestamp,
            tags=dict(found.tags),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == number)),
        )

    def experiment(self, name: str) -> str:
        """Return the experiment's id; it is made where it is missing."""
        root = artifact_root(self.uri)
        for _ in range(2):
            found = self.ask("get_experiment_by_name", name)
            if found is not None:
                if found.lifecycle_stage != "active":
                    raise RegraftError(
                        f"the MLflow experiment {name} was deleted",
                        fix=f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another"
                        " name in register.experiment",
                    )
                return str(found.experiment_id)
            try:
                return str(self.ask("create_experiment", name, artifact_location=None if root is None else str(root)))
            except Answer as answer:  # another process was first: look again
                if answer.code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise self.unavailable(f"experiment {name} exists and cannot be read")

    def find_run(self, experiment: str, tags: dict[str, str]) -> Any:
        """Return the oldest run that carries all of these tags, None where there is none."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.ask("search_runs", [experiment], query, max_results=1, order_by=["attributes.start_time ASC"])
        return found[0] if found else None


def prepare_mlflow(timeout: int) -> None:
    """Bound and silence MLflow in this process; it reads its environment at each call."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.update(
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_HTTP_REQUEST_TIMEOUT=str(timeout),
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    )
    import mlflow  # noqa: F401 - it configures its logger when imported

    # MLflow's own use of SQLAlchemy: an option deprecated since, and two processes that delete the same row.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
    warnings.filterwarnings("ignore", message="DELETE statement on table .* expected to delete")
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def initialise(file: Path) -> None:
    """Make a SQLite store where there is none: migrated in a file beside it and put in place by one rename.

    Processes that migrate the same file at once fail (three of four did), and a killed one leaves half a schema.
    """
    if file.exists() and file.stat().st_size > 0:
        with file.open("rb") as opened:
            if opened.read(16) != b"SQLite format 3\0":
                raise DamagedArtifact(f"{file} is not a SQLite database", fix="restore it from a backup, or move it")
        return
    try:
        with waited_hold(file.with_name(f"{file.name}.lock"), f"the MLflow store {file}"):
            if file.exists() and file.stat().st_size > 0:
                return
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            fresh = file.with_name(f"{file.name}.new")
            for leftover in file.parent.glob(f"{fresh.name}*"):
                leftover.unlink()
            store = SqlAlchemyStore(f"sqlite:///{fresh}", str(file.parent / "mlartifacts"))
            store.engine.dispose()
            fresh.replace(file)
    except OSError as error:
        if isinstance(error, RegraftError):
            raise
        raise RegraftError(
            f"the MLflow store {file} cannot be made: {error.strerror}", fix="check the folder's owner, mode and space"
        ) from error


@contextmanager
def waited_hold(lock: Path, what: str, seconds: float = LOCK_PATIENCE) -> Iterator[None]:
    """Hold a lock as `artifacts.hold`, waiting for another process at most `seconds`."""
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(lock, what))
                break
            except Busy:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)
        yield
