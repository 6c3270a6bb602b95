"""Batches of rows looked at on a Ray cluster; see `regraft.cluster`.

A call is one batch: its rows travel, since this machine alone reads the raw files, in order, and puts together what was found.
So a node needs no file of the clone's data, and what Ray keeps of rows is what is on its way.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from regraft.artifacts import digest_file
from regraft.cluster import ClusterPool, Given
from regraft.validate.look import Looker

_LIBRARIES = ("pyarrow", "numpy", "pydantic")
_OF_LANGUAGES = ("py3langid",)
_OF_PRESIDIO = ("presidio-analyzer", "spacy", "phonenumbers", "tldextract")


def cluster_pool(address: str, looker: Looker) -> ClusterPool:
    """Connect to a cluster whose processes look at batches as this looker does.

    Raises:
        MissingInput: Ray is not installed.
        ServiceUnavailable: no cluster answers there.
    """
    return ClusterPool(
        address,
        Given(looker, _ready, _made_of),
        piece="a batch of rows",
        fix="give its nodes more memory, and run the same command again",
    )


def _made_of(looker: Looker) -> dict[str, str]:
    """What decides what is found in a batch besides rows and parameters: the code, and the libraries that are asked."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here.parent / name for name in ("artifacts.py", "messages.py"))])
    code = hashlib.sha256("".join(digest_file(file) for file in files).encode()).hexdigest()
    params = next(iter(looker.mappings.values())).params
    named = [*_LIBRARIES, *(_OF_LANGUAGES if params.language is not None else ())]
    if params.personal is not None:
        named += [*_OF_PRESIDIO, *([] if params.personal.model is None else [params.personal.model])]
    return {"regraft": code, **{name: _version(name) for name in named}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # on a node, which is refused; what is missing here was found before
        return "none"


def _ready(looker: Looker) -> None:
    from regraft.validate import work

    work.become_worker(looker)
