"""Parameters of the registry: the sections `register` and `promote`."""

from pydantic import Field, field_validator

from regraft.params import Section

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
"""What MLflow keeps runs and versions in; a folder (`./mlruns`) is refused by MLflow 3."""


class RegisterParams(Section):
    """Where runs and versions are kept, and how long to wait for it."""

    model_name: str = Field(default="regraft", min_length=1, max_length=200, pattern=r"^[^/:%'\"]+$")
    """Name of the registered model; one for each task that a clone trains for."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow's server or database. A relative SQLite path counts from the clone's root, its artefacts lie in
    `mlartifacts/` beside it. The environment variable MLFLOW_TRACKING_URI wins; put no password here, it would be
    committed: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are read by MLflow itself."""
    experiment: str = Field(default="regraft", min_length=1, max_length=200)
    """MLflow experiment that holds one run for each training."""
    timeout: int = Field(default=10, ge=1, le=20)
    """Seconds without an answer after which one call is given up (uploads: seconds without progress). With `patience`
    it bounds `register` and `promote` to less than a minute when a server hangs; MLflow's own default is 120 s, seven
    times over."""
    patience: int = Field(default=20, ge=1, le=35)
    """Seconds for which a server that refuses, hangs or answers with an error is tried again. One that
    answers, however slowly, is never given up."""

    @field_validator("tracking_uri")
    @classmethod
    def _is_a_store(cls, value: str) -> str:
        return check_uri(value)


class PromoteParams(Section):
    """When a challenger becomes the champion."""

    auto: bool = True
    """Promote at once when the verdict passed; otherwise `retrain` ends with a challenger that waits for
    `regraft promote`."""


def check_uri(value: str) -> str:
    """Return `value` if MLflow can keep versions there, else raise a ValueError that says what it can use."""
    scheme, separator, rest = value.partition("://")
    if not separator or scheme.partition("+")[0] not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"a tracking URI that starts with one of {known} (MLflow 3 keeps no versions in a folder)")
    if scheme.startswith("sqlite") and rest.strip("/") in ("", ":memory:"):
        raise ValueError("a SQLite file such as sqlite:///mlflow.db (a database in memory keeps nothing)")
    return value
