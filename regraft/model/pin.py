"""The stage `model`: find or make the base model, refuse what is unfit, and pin it by the digests of its files."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from regraft.artifacts import commit_dir, digest_json
from regraft.errors import DamagedArtifact, MissingInput, ParamsError, RegraftError, ServiceUnavailable
from regraft.failpoints import failpoint
from regraft.model.header import Tensor, read_header
from regraft.model.params import STANDIN, ModelParams
from regraft.model.report import BaseReport

WEIGHTS = "weights"
"""Folder of the stand-in's files inside the stage's output."""
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def pin(params: ModelParams, *, corpus: Path, out: Path) -> BaseReport:
    """Pin the base model that `params` name; the stand-in is trained here first.

    Args:
        params: only `base`, `revision` and `standin` matter.
        corpus: text that the stand-in is trained on; not read for another base.
        out: gets `report.json`, `weights/` for the stand-in, and `tokenizer/` where tokens are added.

    Raises:
        MissingInput: no such folder, or files of the model are missing.
        DamagedArtifact: weights are not safetensors, or the configuration asks for code of its own.
        ParamsError: a hub model without a revision.
        ServiceUnavailable: the hub does not answer.
    """
    with commit_dir(out) as folder:
        if params.base == STANDIN:
            from regraft.model.standin import make_standin

            if not corpus.is_file():
                raise MissingInput(f"{corpus} is missing", fix=f"git checkout {corpus}")
            make_standin(corpus, folder / WEIGHTS, params.standin)
            failpoint("model.trained")
            report = describe(folder / WEIGHTS, params, path=(out / WEIGHTS).as_posix())
        elif (weights := Path(params.base)).is_dir():
            if params.revision is not None:
                raise ParamsError(
                    f"model.revision: found {params.revision}, but model.base is the folder {params.base}",
                    fix="set model.revision to null: a folder is pinned by the digests of its files",
                )
            report = describe(weights, params, path=params.base)
        else:
            report = describe(hub_folder(params.base, params.revision), params, path=None)
        if params.new_tokens:
            from regraft.model.tokens import FOLDER, extend_tokenizer

            where = folder / WEIGHTS if params.base == STANDIN else weights_folder(report, out)
            extend_tokenizer(where, folder / FOLDER, params.new_tokens)
            extended = digest_json(digest_files(folder / FOLDER, TOKENIZER_FILES))
            report = report.model_copy(update={"tokenizer_digest": extended, "new_tokens": list(params.new_tokens)})
        report.save(folder / "report.json")
    return report


def describe(weights: Path, params: ModelParams, *, path: str | None) -> BaseReport:
    """Check a folder with a model in the Hugging Face layout and return what it is; reads every byte once."""
    config = check_folder(weights)
    files = digest_files(weights)
    tensors = [tensor for file in sorted(weights.glob("*.safetensors")) for tensor in read_header(file).values()]
    source = "standin" if params.base == STANDIN else "hub" if path is None else "folder"
    return BaseReport(
        source=source,
        base=params.base,
        name=Path(params.base).resolve().name if source == "folder" else params.base,
        revision=params.revision,
        path=path,
        digest=digest_json(_select(files, MODEL_FILES)),
        tokenizer_digest=digest_json(_select(files, TOKENIZER_FILES)),
        files=files,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        dtype=_main_dtype(tensors),
        architecture=str((config.get("architectures") or ["unknown"])[0]),
    )


def check_folder(weights: Path) -> dict[str, Any]:
    """Refuse a model folder that lacks files, is pickled, is quantised already, or names code of its own.

    Returns:
        The model's configuration.
    """
    config = _read_config(weights / "config.json")
    if not (weights / "tokenizer.json").is_file() and not (weights / "tokenizer.model").is_file():
        raise MissingInput(f"{weights} has no tokenizer.json", fix="put the tokenizer's files beside the weights")
    if not any(weights.glob("*.safetensors")):
        pickled = sorted(p.name for p in weights.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise DamagedArtifact(
                f"{weights} has pickled weights ({', '.join(pickled)}); only safetensors is read: a pickle runs code",
                fix="convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
            )
        raise MissingInput(f"{weights} has no *.safetensors")
    index = weights / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_config(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (weights / name).is_file()]
        if missing:
            raise MissingInput(f"{weights} lacks {', '.join(missing[:5])}, which {index.name} names")
    tokenizer_config = weights / "tokenizer_config.json"
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", _read_config(tokenizer_config) if tokenizer_config.is_file() else {}),
    ):
        if content.get("auto_map"):
            raise DamagedArtifact(
                f"{weights / name} names code of its own (auto_map), which is never run",
                fix="if transformers knows the architecture, remove `auto_map` in a local copy and give that folder",
            )
    if config.get("quantization_config"):
        raise DamagedArtifact(
            f"{weights / 'config.json'}: these weights are quantised already; an adapter is merged into the 16-bit ones",
            fix="give the original model as model.base, and its bits in model.quantization",
        )
    return config


def hub_folder(base: str, revision: str | None, *, offline: bool = False) -> Path:
    """Return the hub cache's folder of a pinned model, fetching the files that count and no others.

    Args:
        base: a hub id, `organisation/name`.
        revision: a commit.
        offline: look in the cache only.
    """
    if base.startswith(("/", "~", ".")) or base.count("/") > 1 or base.endswith("/"):
        raise MissingInput(f"model.base: there is no folder {base}", fix="correct model.base in params.yaml")
    if revision is None:
        raise ParamsError(
            f"model.base: {base} is not a folder here, and as a hub model it needs model.revision, the commit's 40 digits",
            fix="correct the folder's path, or copy the commit from the model's page (Files, History)",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                base,
                revision=revision,
                allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES],
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as error:
        where = "in the hub's cache" if offline else "in the hub's cache, and the hub was not reached"
        raise ServiceUnavailable(
            f"{base} at {revision} is not {where}",
            fix="check the network, HF_HUB_OFFLINE and HF_ENDPOINT, then `python -m regraft.model`",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise RegraftError(
            f"{base} at {revision} could not be fetched: {error}",
            fix="check the id and the revision; a gated model needs HF_TOKEN",
        ) from error


def weights_folder(report: BaseReport, out: Path) -> Path:
    """Return the folder with a pinned base's weights; `out` is the stage's output."""
    if report.source == "standin":
        return out / WEIGHTS  # wherever the stage's output lies
    if report.source == "hub" or report.path is None:
        return hub_folder(report.base, report.revision, offline=True)
    return Path(report.path)


def digest_files(weights: Path, patterns: Iterable[str] = (*MODEL_FILES, *TOKENIZER_FILES)) -> dict[str, str]:
    """Return {name: sha256} of a model folder's files that match; links (the hub's cache has them) are followed."""
    paths = sorted({path for pattern in patterns for path in weights.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, paths))
    return {path.relative_to(weights).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _select(files: dict[str, str], patterns: Iterable[str]) -> dict[str, str]:
    wanted = tuple(patterns)
    return {name: digest for name, digest in files.items() if any(Path(name).match(p) for p in wanted)}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing", fix="give a folder with config, safetensors and tokenizer") from error
    except (ValueError, RecursionError) as error:
        raise DamagedArtifact(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedArtifact(f"{path} is not a JSON object")
    return content


def _main_dtype(tensors: list[Tensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    main = max(sizes, key=lambda dtype: sizes[dtype])
    return _DTYPES.get(main, main)
