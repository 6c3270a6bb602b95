"""Real models, adapters and holdouts, small enough for a test each."""

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


def _load(name: str) -> None:
    """Make `import small` work in importlib mode, in the processes that tests start, too."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("small")
_load("pieces")
_load("hub_server")


@dataclass(frozen=True)
class Exported:
    """A clone with one export, made by the command."""

    root: Path
    identity: str

    @property
    def exports(self) -> Path:
        return self.root / "data/exports"

    @property
    def folder(self) -> Path:
        return self.exports / self.identity[:16]

    def copy(self, to: Path) -> "Exported":
        """A clone of its own, to break."""
        shutil.copytree(self.root, to, symlinks=True)
        return Exported(to, self.identity)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Read it, don't write into it."""
    import small

    root = tmp_path_factory.mktemp("export") / "clone"
    identity = small.make_clone(root)
    done = small.export_command(root, identity)
    assert done.returncode == 0, done.stderr
    return Exported(root, identity)
