"""`regraft merge`: any PEFT LoRA adapter into the base that it was trained on, without a clone of Regraft around it.

OUT/                 model, tokenizer, config, merge.json (what was merged, what survived), SHA256SUMS, manifest.json
.OUT.merging/        finished shards of a merge that was killed; the same command goes on from there
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from regraft.artifacts import MANIFEST, commit_dir, digest_file, digest_json, hold, read_json, verify_dir
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, PinMismatch, RegraftError
from regraft.export.beside import digests_beside
from regraft.export.certificate import SIGNATURE, SUMS, sums
from regraft.export.folder import licence_files, write_companions, write_tokenizer
from regraft.export.lora import CONFIG, WEIGHTS
from regraft.export.merge import Rounding, merge
from regraft.export.plan import Plan, plan_merge
from regraft.export.report import FileEntry
from regraft.export.signature import sign, signing_key
from regraft.export.survival import Survival, Survived
from regraft.export.tensors import catalogue, shards
from regraft.report import Report

log = logging.getLogger("regraft")
RECORD = "merge.json"


class Merged(BaseModel):
    """One adapter of a merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    digest: str
    """Digest of {file: sha256} over configuration and weights."""
    weight: float
    modules: int
    """Factors, weights saved whole and sets of trained tokens."""


class MergeRecord(Report):
    """What `regraft merge` did; deterministic, without paths of this machine."""

    base: dict[str, str]
    """sha256 of each weight file and of the config of the base."""
    adapters: list[Merged]
    dtype: str
    rounding: str
    untied: bool
    """The output layer was parted from the input embedding."""
    vocabulary: int | None
    """Rows of the embedding where an adapter brought tokens along."""
    survival: list[Survived]
    """How much of each module's change is left after rounding."""
    files: dict[str, FileEntry]
    """Every file but this one, SHA256SUMS and manifest.json."""


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str = "own",
    rounding: Rounding = "nearest",
    more: Sequence[tuple[Path, float]] = (),
    weight: float = 1.0,
    base_digests: dict[str, str] | None = None,
) -> MergeRecord:
    """Merge adapters into a base and put the result in place of `out`, whole or not at all.

    Args:
        base: a model's folder in safetensors.
        adapter: a PEFT LoRA adapter's folder.
        out: is made, or replaced if it is an earlier merge.
        dtype: `own` keeps each tensor's type in the base; `bf16`, `fp16`, `fp32`.
        rounding: see `regraft.export.merge.merge`.
        more: further adapters with their weights.
        weight: of the first adapter.
        base_digests: sha256 of files of the base, as an earlier merge's record has them; another byte is refused.

    Raises:
        ParamsError: `out` holds something else, or an adapter cannot be merged.
        DamagedArtifact: the adapter does not fit, or changes nothing.
        PinMismatch: the base is not the one of `base_digests`.
        RegraftError: the disk is too small.
        Busy: another merge into `out` is running.
    """
    signer = signing_key()
    plan = plan_merge(base, adapter, dtype, more=more, weight=weight)
    _check_place(out, plan)
    partial = out.absolute().with_name(f".{out.name}.merging")
    with hold(partial / "lock", f"the merge into {out}"):
        try:
            _check_disk(plan, partial)
        except RegraftError:
            if not (partial / "shards").exists():  # nothing that a next attempt could go on from
                shutil.rmtree(partial, ignore_errors=True)
            raise
        names = ("config.json", *shards(base))
        seen = {name: [(base / name).stat().st_size, (base / name).stat().st_mtime_ns] for name in names}
        adapters = [
            Merged(
                name=each.folder.name,
                digest=digest_json({name: digest_file(each.folder / name) for name in (CONFIG, WEIGHTS)}),
                weight=factor,
                modules=len(each.pairs) + len(each.copies) + len(each.tokens),
            )
            for each, factor in zip(plan.adapters, (weight, *(factor for _, factor in more)), strict=True)
        ]
        survival = Survival()
        key = digest_json([seen, [each.model_dump() for each in adapters], dtype])
        made: dict[str, str] = {}
        with digests_beside(base, names) as digests, commit_dir(out, made) as folder:
            shards_of = partial / "shards"
            made |= merge(plan, folder, rounding=rounding, partial=shards_of, key=key, survival=survival)
            write_companions(plan, folder, dtype=dtype)
            write_tokenizer(plan, folder)
            for path in licence_files(base):
                shutil.copyfile(path, folder / path.name)
            found = digests()
            _check_digests(base, found, base_digests or {})
            record = MergeRecord(
                base=found,
                adapters=adapters,
                dtype=dtype,
                rounding=rounding,
                untied=plan.untied,
                vocabulary=plan.vocabulary,
                survival=survival.layers,
                files=_entries(folder, made),
            )
            _check_change(plan, record)
            record.save(folder / RECORD)
            (folder / SUMS).write_bytes(sums({**record.files, RECORD: _entry(folder / RECORD)}))
            sign(folder, signer)
        shutil.rmtree(partial / "shards", ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    return record


def verify_merge(folder: Path) -> MergeRecord:
    """Check a merged folder, wherever it lies: every byte, the sums, the record and the weights' index.

    Raises:
        MissingInput: it is no merge, or not a whole one.
        DamagedArtifact: something differs; the message names all of it.
    """
    verify_dir(folder)
    listed = {name: FileEntry(**entry) for name, entry in read_json(folder / MANIFEST)["files"].items()}
    missing = [name for name in (RECORD, SUMS, "config.json") if name not in listed]
    if missing:
        raise MissingInput(f"{folder} is not a merge: it has no {', '.join(missing)}")
    record = MergeRecord.load(folder / RECORD)
    problems = []
    if record.files != {name: entry for name, entry in listed.items() if name not in (RECORD, SUMS, SIGNATURE)}:
        problems.append(f"{RECORD} lists other files or digests than the folder holds")
    if (folder / SUMS).read_bytes() != sums(
        {name: entry for name, entry in listed.items() if name not in (SUMS, SIGNATURE)}
    ):
        problems.append(f"{SUMS} lists other files or digests than the folder holds")
    try:
        catalogue(folder)
    except RegraftError as error:
        problems.append(error.message)
    if problems:
        raise DamagedArtifact(f"{folder} is not a verified merge: " + "; ".join(problems), fix="regraft merge")
    return record


def _check_place(out: Path, plan: Plan) -> None:
    inside = [plan.base, *(adapter.folder for adapter in plan.adapters)]
    if any(out.resolve() == each.resolve() or out.resolve() in each.resolve().parents for each in inside):
        raise ParamsError(f"--out {out} would replace what is to be merged", fix="name another folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file()):
        raise ParamsError(f"{out} holds something that is no earlier merge", fix="name a folder that does not exist")


def _check_disk(plan: Plan, place: Path) -> None:
    free = shutil.disk_usage(place).free + sum(
        path.stat().st_size for path in place.rglob("*.safetensors") if path.is_file()
    )
    if plan.size > free:
        raise RegraftError(
            f"the merge needs {plan.size / 1e6:.1f} MB beside {place.parent}, {free / 1e6:.1f} MB are free",
            fix="free some space, or name a folder on another disk with --out",
        )


def _check_digests(base: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    wrong = [f"{name} has {found.get(name, 'no file')}, expected {wanted[name]}" for name in wanted]
    wrong = [line for name, line in zip(wanted, wrong, strict=True) if found.get(name) != wanted[name]]
    if wrong:
        raise PinMismatch(f"{base} is not the base that was named: " + "; ".join(wrong), fix="restore the base's files")


def _check_change(plan: Plan, record: MergeRecord) -> None:
    """Refuse an adapter that says nothing; a part that says nothing is usual (a layer left untrained)."""
    replaced = any(step.copy or step.rows or step.biases for step in plan.steps)
    if not replaced and all(layer.relative == 0 for layer in record.survival):
        raise DamagedArtifact("B is zero in every layer: the adapter changes nothing", fix="train it first")


def _entries(folder: Path, known: dict[str, str]) -> dict[str, FileEntry]:
    """Size and digest of each file; `known` digests were taken while the bytes went by."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = FileEntry(sha256=known[name], size=path.stat().st_size) if name in known else _entry(path)
        found[name] = entry
    return found


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=digest_file(path), size=path.stat().st_size)
