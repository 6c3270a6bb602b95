"""The commands `merge`, `verify`, `publish` and `serve`: they need no clone, only folders."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from regraft.command import Json, Remembering, answer, listen
from regraft.errors import ParamsError
from regraft.export.params import Server

commands = typer.Typer()
PANEL = "Any adapter, any export"


class Dtype(StrEnum):
    """What merged weights can be stored in."""

    OWN = "own"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class How(StrEnum):
    """How the sum is rounded."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    PEFT = "peft"


@commands.command(rich_help_panel=PANEL)
def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, in safetensors.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT LoRA adapter.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; an earlier merge there is replaced.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; `own` keeps the base's.")] = Dtype.OWN,
    rounding: Annotated[
        How, typer.Option("--rounding", help="How sums are rounded; `peft` twice where PEFT does.")
    ] = How.NEAREST,
    more: Annotated[
        list[str] | None, typer.Option("--and", help="A further adapter, `FOLDER` or `FOLDER=WEIGHT`; may be repeated.")
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="Factor of the first adapter's change.")] = 1.0,
    base_sha256: Annotated[
        list[str] | None, typer.Option("--base-sha256", help="`FILE=SHA256` of the base; another byte is refused.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base model, streaming: under a gigabyte of memory whatever the model's size."""
    listen()
    from regraft.export.standalone import merge_adapter
    from regraft.export.survival import worst

    others = [_weighted(each) for each in more or []]
    digests = dict(_pair(each, "--base-sha256") for each in base_sha256 or [])
    record = merge_adapter(
        base, adapter, out, dtype=dtype.value, rounding=rounding.value, more=others, weight=weight, base_digests=digests
    )
    size = sum(entry.size for entry in record.files.values())
    lines = [f"Merged into {out}: {size / 1e6:.1f} MB; {len(record.survival)} tensors changed."]
    lines += ["The output layer was parted from the input embedding."] if record.untied else []
    lines += [
        f"least left of a change: {each.name}: cosine {each.cosine:.4f}, norm {each.norm:.4f}, "
        f"change {each.relative:.2%} of the weight"
        for each in worst(record.survival, 3)
    ]
    answer(record.to_dict(), lines, as_json=as_json)


@commands.command(rich_help_panel=PANEL)
def verify(
    folder: Annotated[Path, typer.Argument(help="An export, or what `regraft merge` made.")],
    signed_by: Annotated[
        Path | None, typer.Option("--signed-by", help="A public key in PEM; another's signature, or none, is refused.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of an export or a merge, its sums and its certificate; offline, nothing is loaded."""
    from regraft.export.report import Certificate
    from regraft.export.whole import verify_folder

    found = verify_folder(folder)
    if signed_by is not None:
        from regraft.export.signature import check_signature

        check_signature(folder, signed_by)
    if isinstance(found, Certificate):
        what = f"version {found.identity[:16]}, {len(found.files)} files, verdict passed."
    else:
        what = f"a merge of {', '.join(each.name for each in found.adapters)}, {len(found.files)} files."
    signed = "" if signed_by is None else f" Signed by {signed_by.name}."
    answer(found.to_dict(), [f"{folder} is whole: {what}{signed}"], as_json=as_json)


@commands.command(rich_help_panel=PANEL)
def publish(
    folder: Annotated[Path, typer.Argument(help="An export, or what `regraft merge` made.")],
    url: Annotated[
        str, typer.Argument(help="A folder, s3://bucket/models/support, hf://owner/repository, or dvc://remote/path.")
    ],
    keep: Annotated[int, typer.Option("--keep", min=1, help="Exports to keep there, the new one included.")] = 3,
    latest: Annotated[bool, typer.Option(help="Let latest.json (on the hub: main) be this export.")] = True,
    public: Annotated[bool, typer.Option("--public", help="Let a repository made on the hub be public.")] = False,
    remembering: Remembering = False,
    as_json: Json = False,
) -> None:
    """Send an export to a store, the hub or a DVC remote, check it there, and move the pointer last."""
    listen()
    from regraft.export.remote import publish_to
    from regraft.steps import check_publishable

    check_publishable(folder, remembering=remembering)
    done = publish_to(folder, url, keep=keep, latest=latest, private=not public)
    lines = [f"{done.url}/{done.name}: {done.sent} files sent{', now the latest' if done.moved else ''}."]
    lines += [f"removed: {', '.join(done.removed)}"] if done.removed else []
    answer(done.model_dump(), lines, as_json=as_json)


@commands.command(rich_help_panel=PANEL)
def serve(
    folder: Annotated[Path, typer.Argument(help="An export, or what `regraft merge` made.")],
    check: Annotated[
        bool, typer.Option("--check", help="Start the server, ask it, compare its answers, stop it.")
    ] = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to ask; may be repeated.")] = None,
    server: Annotated[
        Server, typer.Option("--server", help="Whose server; llama.cpp's gets the form gguf-f16.")
    ] = Server.TRANSFORMERS,
    as_json: Json = False,
) -> None:
    """Ask a served export over OpenAI's protocol, and compare with what its files answer here."""
    listen()
    if not check:
        raise ParamsError("regraft serves nothing itself", fix=f"transformers serve {folder}, or add --check")
    from regraft.export.serving import serve_check

    served = serve_check(folder, prompt or ["Hello"], server)
    lines = [f"{each.prompt!r}: {each.answer!r} ({each.finish_reason}, {each.milliseconds} ms)" for each in served]
    answer([each.model_dump() for each in served], lines, as_json=as_json)


def _weighted(text: str) -> tuple[Path, float]:
    folder, separator, weight = text.rpartition("=")
    if not separator:
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError as error:
        raise ParamsError(f"--and {text}: {weight!r} is no number, expected FOLDER=WEIGHT") from error


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ParamsError(f"{option} {text}: expected NAME=VALUE")
    return name, value
