"""The base of every report: a typed, versioned JSON document that DVC, MLflow and the gates read."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from regraft.artifacts import pretty_json, read_json, write_file
from regraft.errors import DamagedArtifact


class Report(BaseModel):
    """A frozen document with a `schema_version`; it holds deterministic results only, never a time or a host."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants")
    VERSION: ClassVar[int] = 1

    schema_version: int = 1

    def save(self, path: Path) -> None:
        """Write the report as indented JSON, atomically; equal reports give equal bytes."""
        write_file(path, pretty_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report.

        Raises:
            MissingInput: it is not there.
            DamagedArtifact: it is not such a report, or one of another version.
        """
        content = read_json(path)
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != cls.VERSION:
            raise DamagedArtifact(f"{path} has schema_version {found}, expected {cls.VERSION}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DamagedArtifact(f"{path} is not a {cls.__name__}: {error}") from error
