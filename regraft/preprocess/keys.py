"""The first look at a shard: what each row is called by (its key), its answer, its time, and its side."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import read_json, write_json
from regraft.messages import words
from regraft.preprocess.benchmarks import WORDS
from regraft.preprocess.holdout import plain, prompt_text, row_entry
from regraft.preprocess.mix import SLICE
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preferences import COLUMNS as PREFERENCE_COLUMNS
from regraft.preprocess.preferences import holds_preferences
from regraft.preprocess.shards import Shard, read_batches

if TYPE_CHECKING:
    import numpy as np

KEYS, NAMES, NEAR = "keys.npz", "names.json", "near.npz"
_COLUMNS = ("row_id", "messages", "slices", "at")


@dataclass(frozen=True)
class Keys:
    """What decides about the rows of a shard; 64 bits of a digest tell rows apart (in 10 million, 3e-6 to err once)."""

    keys: "np.ndarray"
    """(rows, 32) bytes: the sha256 of each row's prompt."""
    answers: "np.ndarray"
    """The first 64 bits of the sha256 of each answer."""
    times: "np.ndarray"
    """`S32`; "~" where there is none."""
    ids: "np.ndarray"
    """The first 64 bits of each row_id."""
    fates: "np.ndarray"
    """int8; what the row itself decides."""
    names: frozenset[str]
    """Slices that occur."""

    @property
    def prefixes(self) -> "np.ndarray":
        """The first 64 bits of each key."""
        import numpy as np

        return np.ascontiguousarray(self.keys[:, :8]).view(">u8").ravel().astype(np.uint64)


def read_keys(path: Path, shard: Shard, params: PreprocessParams, folder: Path) -> None:
    """Look at every row of a shard and write what was found into `folder`."""
    import numpy as np

    from regraft.preprocess.near import grams, sketch

    wanted = looked_for(params)
    near: list[tuple[np.ndarray, np.ndarray]] = []
    whole: list[np.ndarray] = []
    origins: list[bytes] = []
    runs: list[tuple[np.ndarray, np.ndarray]] = []

    entries: list[tuple[str, str, str, str, int]] = []
    names: set[str] = set()
    preferences = holds_preferences(path)
    named = (*_COLUMNS, *PREFERENCE_COLUMNS) if preferences else _COLUMNS
    for batch in read_batches(path, named, shard.first, shard.end):
        columns = (batch[name].to_pylist() for name in _COLUMNS)
        some: list[Any] = batch["messages"].to_pylist()
        own: list[dict[str, Any]] = batch.select(PREFERENCE_COLUMNS).to_pylist() if preferences else [{} for _ in some]
        if params.leaks.near is not None:
            near.append(sketch([prompt_text(messages) for messages in some]))
        if wanted["run"] is not None or wanted["whole"]:
            texts = [
                plain("\n".join((*(words(each) for each in messages), *_other(other))))
                for messages, other in zip(some, own, strict=True)
            ]
            if wanted["run"] is not None:
                runs.append(grams(texts, wanted["run"]))
            if wanted["whole"]:
                whole.append(sketch(texts)[0])
        for row_id, messages, slices, at, other in zip(*columns, own, strict=True):
            row = {"row_id": row_id, "messages": messages, "slices": dict(slices or ()), "at": at, **other}
            if slices:
                names.update(row["slices"])
            if wanted["origins"]:
                origins.append(row["slices"].get(SLICE, "").encode())
            entries.append(row_entry(row, params.holdout))
    keys, answers, times, ids, fates = zip(*entries, strict=True)
    np.savez(
        folder / KEYS,
        keys=np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32),
        answers=np.frombuffer(bytes.fromhex("".join(each[:16] for each in answers)), ">u8").astype(np.uint64),
        times=np.array(times, "S32"),
        ids=np.frombuffer(bytes.fromhex("".join(each[:16] for each in ids)), ">u8").astype(np.uint64),
        fates=np.array(fates, np.int8),
    )
    found: dict[str, np.ndarray] = {}
    if near:
        found |= {"signatures": np.concatenate([a for a, _ in near]), "bags": np.concatenate([b for _, b in near])}
    if runs:
        found |= {"runs": np.concatenate([a for a, _ in runs]), "counts": np.concatenate([b for _, b in runs])}
    if whole:
        found["whole"] = np.concatenate(whole)
    if origins:
        found["origins"] = np.array(origins, np.bytes_)
    np.savez(folder / NEAR, **found)  # type: ignore[arg-type]
    write_json(folder / NAMES, sorted(names))


def _other(preference: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the answer of a pair that is not preferred, where there is one."""
    rejected = preference.get("rejected")
    return () if rejected is None else (str(rejected),)


def looked_for(params: PreprocessParams) -> dict[str, Any]:
    """Return what `read_keys` has to keep of each row: what decides about that, and nothing else, names its entry."""
    leaks = params.leaks
    return {
        "near": leaks.near is not None,
        "run": leaks.run if leaks.run is not None or not leaks.benchmarks else WORDS,
        "whole": params.near_duplicates is not None,
        "origins": bool(params.mix),
    }


def load_keys(folder: Path) -> Keys:
    """Load what `read_keys` wrote."""
    import numpy as np

    with np.load(folder / KEYS) as found:
        return Keys(**{name: found[name] for name in found.files}, names=frozenset(read_json(folder / NAMES)))


def load_near(folder: Path) -> dict[str, "np.ndarray"]:
    """Load what the search for leaks needs: `signatures` and `bags`, `runs` and `counts`, `whole`, `origins`, where they were asked for."""
    import numpy as np

    with np.load(folder / NEAR) as found:
        return dict(found)
