"""Who made a folder: signatures of its sums, against Regraft's check and openssl's."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption
from cryptography.hazmat.primitives.serialization import PrivateFormat as Private
from cryptography.hazmat.primitives.serialization import PublicFormat as Public
from typer.testing import CliRunner

from regraft.artifacts import commit_dir
from regraft.cli import app
from regraft.errors import DamagedArtifact, MissingInput, ParamsError
from regraft.export.certificate import SIGNATURE, SUMS, verify_export
from regraft.export.publish import publish
from regraft.export.signature import VARIABLE, check_signature, signing_key
from regraft.export.standalone import merge_adapter
from regraft.export.whole import verify_folder


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, Private.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, Public.SubjectPublicKeyInfo))
    return private, public


def test_a_signed_merge_is_checked_by_the_maker_s_key_and_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = keys(tmp_path, "ours")
    _, others = keys(tmp_path, "theirs")
    base = small.make_llama(tmp_path / "base")
    adapter = small.make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "plain")
    monkeypatch.setenv(VARIABLE, str(private))

    merge_adapter(base, adapter, tmp_path / "signed")

    folder = shutil.copytree(tmp_path / "signed", tmp_path / "a copy")
    assert (folder / SUMS).read_bytes() == (tmp_path / "plain" / SUMS).read_bytes()
    assert {path.name for path in folder.iterdir()} - {path.name for path in (tmp_path / "plain").iterdir()} == {
        SIGNATURE
    }
    verify_folder(folder)
    check_signature(folder, public)
    done = CliRunner().invoke(app, ["verify", str(folder), "--signed-by", str(public)])
    assert (done.exit_code, "Signed by ours-public.pem." in done.output) == (0, True)
    with pytest.raises(DamagedArtifact, match=r"is not theirs-public\.pem's signature"):
        check_signature(folder, others)
    with pytest.raises(MissingInput, match="is not signed"):
        check_signature(tmp_path / "plain", public)
    (folder / SUMS).write_bytes((folder / SUMS).read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(DamagedArtifact, match="signature of SHA256SUMS"):
        check_signature(folder, public)
    if (openssl := shutil.which("openssl")) is not None:
        command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin", "-in", SUMS]
        command += ["-sigfile", SIGNATURE]
        assert subprocess.run(command, cwd=tmp_path / "signed", capture_output=True, check=False).returncode == 0
        assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode != 0


def test_an_export_is_signed_where_a_key_is_named(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = keys(tmp_path, "ours")
    monkeypatch.setenv(VARIABLE, str(private))
    certificate = verify_export(exported.folder)
    with commit_dir(tmp_path / "candidate") as folder:
        for name in certificate.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(exported.folder / name, folder / name)

    publish(tmp_path / "candidate", {}, certificate, tmp_path / "exports/0")

    assert verify_export(tmp_path / "exports/0").files == certificate.files
    check_signature(tmp_path / "exports/0", public)


def test_an_unfit_key_is_said_before_anything_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elliptic = generate_private_key(SECP256R1())
    kinds = {
        "none.pem": None,
        "text.pem": b"not a key",
        "curve.pem": elliptic.private_bytes(Encoding.PEM, Private.PKCS8, NoEncryption()),
        "locked.pem": Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, Private.PKCS8, BestAvailableEncryption(b"secret")
        ),
    }
    says = {"none.pem": "No such file", "curve.pem": "a key of kind _?E", "text.pem": "no private key in PEM"}
    for name, content in kinds.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        with pytest.raises(ParamsError, match=says.get(name, "without a passphrase")):
            merge_adapter(tmp_path / "no base", tmp_path / "no adapter", tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "")
    assert signing_key() is None
    private, public = keys(tmp_path, "ours")
    with pytest.raises(ParamsError, match="no public key"):
        (tmp_path / SIGNATURE).write_bytes(b"")
        check_signature(tmp_path, private)
    with pytest.raises(MissingInput, match=r"gone\.pem is missing"):
        check_signature(tmp_path, public.with_name("gone.pem"))


def test_a_check_without_cryptography_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SIGNATURE).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)

    with pytest.raises(MissingInput, match=r"cryptography") as refusal:
        check_signature(tmp_path, tmp_path / "public.pem")
    assert "regraft[sign]" in str(refusal.value)
