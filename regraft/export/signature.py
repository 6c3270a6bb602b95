"""Signed digests: `SHA256SUMS` with an Ed25519 signature (RFC 8032) beside it says who made a folder, not only that it is whole.

    openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out public.pem
    REGRAFT_SIGNING_KEY=key.pem regraft retrain           # exports made from now on hold SHA256SUMS.sig
    regraft verify EXPORT --signed-by public.pem

Anybody can check it without Regraft: `openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in SHA256SUMS -sigfile
SHA256SUMS.sig`. The signature covers the digests of every other file but `manifest.json`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.export.certificate import SIGNATURE, SUMS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

VARIABLE = "REGRAFT_SIGNING_KEY"
_MAKE = "openssl genpkey -algorithm ed25519 -out key.pem"


def signing_key() -> "Ed25519PrivateKey | None":
    """Return the key that `REGRAFT_SIGNING_KEY` names, None where it names none. Ask before the work, not after it.

    Raises:
        ParamsError: it cannot be read, or is no Ed25519 key in PEM without a passphrase.
        MissingInput: the package `cryptography` is not installed.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        return None
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise MissingInput(
            f"{VARIABLE} asks for a signature, which needs cryptography", fix="pip install 'regraft[sign]'"
        ) from error
    try:
        key = load_pem_private_key(Path(place).read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        found = error.strerror if isinstance(error, OSError) else "no private key in PEM without a passphrase"
        raise ParamsError(f"{VARIABLE}: {place}: {found}, expected an Ed25519 key", fix=_MAKE) from error
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.removesuffix("PrivateKey")
        raise ParamsError(f"{VARIABLE}: {place} is a key of kind {kind}, expected Ed25519", fix=_MAKE)
    return key


def sign(folder: Path, key: "Ed25519PrivateKey | None") -> None:
    """Write the signature of a folder's sums beside them; without a key, nothing."""
    if key is not None:
        (folder / SIGNATURE).write_bytes(key.sign((folder / SUMS).read_bytes()))


def check_signature(folder: Path, public: Path) -> None:
    """Check that the holder of a key signed a folder's sums; whether the files are those of the sums is `verify_folder`'s.

    Raises:
        MissingInput: the folder is not signed, there is no such key, or the package `cryptography` is not installed.
        ParamsError: the key is no Ed25519 public key in PEM.
        DamagedArtifact: somebody else signed it, or the sums were changed afterwards.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise MissingInput("a signature is checked with cryptography", fix="pip install 'regraft[sign]'") from error
    if not (folder / SIGNATURE).is_file():
        raise MissingInput(
            f"{folder} is not signed: it has no {SIGNATURE}", fix=f"make it again where {VARIABLE} names the key"
        )
    try:
        key = load_pem_public_key(public.read_bytes())
    except FileNotFoundError as error:
        raise MissingInput(f"{public} is missing", fix="name the public key in PEM") from error
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ParamsError(
            f"{public} is no public key in PEM", fix=f"openssl pkey -in key.pem -pubout -out {public}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ParamsError(f"{public} is not an Ed25519 key", fix="name the public half of the key that signed it")
    try:
        key.verify((folder / SIGNATURE).read_bytes(), (folder / SUMS).read_bytes())
    except InvalidSignature as error:
        raise DamagedArtifact(
            f"{folder}: {SIGNATURE} is not {public.name}'s signature of {SUMS}",
            fix="get the folder again from its maker, or the right key",
        ) from error
