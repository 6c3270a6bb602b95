"""Preparation and validation at size: ours, TRL's, and the bare tokenizer, on rows made from GSM8K.

    .venv/bin/python bench/data.py [--rows 200000] [--trl FOLDER] [--llamafactory PYTHON] [--near 200000] [--large 1000000]
        [--validate 1000000] [--json bench/results/data.json]

The rows are GSM8K's questions, each with a row number before it (so none is a duplicate), and their answers; the tokenizer
is a byte-level BPE trained on them. Measured in one run, each in a process of its own, imports included:

    floor       the rendered texts through the Rust tokenizer's `encode_batch_fast`, in batches of 128, its fastest here (of 64 to
                8,192); texts are made before the clock starts, tokens are thrown away
    floor_once  the same in one call, as it is mostly called
    ours        `regraft.preprocess` on `rows.parquet`: read, render, mask, tokenise, split, deduplicate, audit, pack, write
    trl         `SFTTrainer` with `packing=True`, `assistant_only_loss=True` and `dataset_num_proc=2` on the same rows
    llamafactory  LLaMA-Factory's preparation (`bench/llama_factory.py`: ChatML, `neat_packing`, two processes), with --llamafactory
    more        ours again with 1 % more rows and the cache of the first run; and without, to compare every byte
    near        with --near: rows recombined sentence by sentence from GSM8K's, with planted copies of known distance, prepared
                with `near_duplicates: 0.8` and without: time, and which copies were found
    large       with --large: ours on a tenth of so many rows and on all of them, for memory, and each with 1 % more
    validate    `regraft.validate` with its whole default contract, on clean rows and with every twentieth broken

`REGRAFT_SHARED` names the folder that holds `data/gsm8k`. Memory is the most that all processes of a command had at once.
"""

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["prepare"]:  # first of all, as the stage does
    from regraft.preprocess.malloc import keep_small_blocks

    keep_small_blocks()

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("REGRAFT_SHARED", ROOT.parent / "shared"))
LIBRARIES = ("tokenizers", "transformers", "datasets", "pyarrow", "great-expectations")
TEMPLATE = (  # ChatML, with the marks by which TRL finds what the assistant says
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PATTERN = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEAR = 0.8  # what `near_duplicates` is set to where it is measured
_BATCH = 128  # texts in a call of the floor
PARAMS = {"max_length": 512, "holdout": {"share": 0.01}}


def main() -> None:
    """Measure and print; with a part's name first, be the process that is measured."""
    if len(sys.argv) > 1 and sys.argv[1] in PARTS:
        PARTS[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows to prepare")
    parser.add_argument("--trl", type=Path, help="a folder in which trl is installed; without, it is not measured")
    parser.add_argument("--llamafactory", type=Path, help="a python that has llamafactory; without, it is not measured")
    parser.add_argument("--near", type=int, default=0, help="rows to search for near duplicates; 0: none")
    parser.add_argument(
        "--large", type=int, default=0, help="also prepare so many rows, and a tenth, for memory and increments"
    )
    parser.add_argument("--validate", type=int, default=0, help="rows to validate; 0: none")
    parser.add_argument("--repeat", type=int, default=3, help="how often what is compared is measured, by turns")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="regraft-bench-", dir=arguments.scratch) as scratch:
        figures = measure(Path(scratch), arguments)
    ratios, goals = judge(figures)
    result = {
        "figures": figures,
        "ratios": ratios,
        "goals": goals,
        "hardware": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": platform.processor() or platform.machine(),
            "load_before": round(load, 2),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))
    for each in goals:
        print(f"{'ok ' if each['met'] else 'NO '} {each['name']:<60} {each['measured']:>9} ({each['wanted']})")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in `scratch`."""
    import pyarrow.parquet as pq

    figures: dict[str, Any] = {"rows": arguments.rows}
    base = make_base(scratch)
    rows = make_rows(scratch / "rows", arguments.rows)
    more = make_rows(scratch / "more", arguments.rows + arguments.rows // 100)
    floors, ours, once = [], [], []
    for turn in range(arguments.repeat):
        floors.append(run("floor", base, rows, _BATCH))
        once.append(run("floor", base, rows, arguments.rows))
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        ours.append(run("prepare", base, rows, scratch / f"out{turn}", scratch / "cache"))
    # The floor's own clock leaves its imports and its rendering out; ours counts the whole command.
    figures["floor_s"] = statistics.median(each["own_s"] for each in floors)
    figures["floor_once_s"] = statistics.median(each["own_s"] for each in once)
    figures["ours_s"] = statistics.median(each["seconds"] for each in ours)
    figures["floor_cpu_s"] = statistics.median(each["own_cpu_s"] for each in floors)
    figures["ours_cpu_s"] = statistics.median(each["cpu_s"] for each in ours)
    figures["ours_mb"] = max(each["peak_mb"] for each in ours)
    figures["ours_all_s"], figures["floor_all_s"] = [e["seconds"] for e in ours], [e["own_s"] for e in floors]
    if arguments.trl:
        # datasets reads no maps: it gets the one column that it needs
        pq.write_table(pq.read_table(rows / "rows.parquet", columns=["messages"]), rows / "messages.parquet")
        trl = run("trl", base, rows, scratch / "trl", path=arguments.trl)
        figures |= {"trl_s": trl["seconds"], "trl_own_s": trl["own_s"], "trl_cpu_s": trl["cpu_s"]}
    if arguments.llamafactory:
        peer = measure_llama_factory(scratch, rows, arguments.llamafactory)
        figures |= {"llamafactory_s": peer["seconds"], "llamafactory_own_s": peer["own_s"]}
        figures["llamafactory_cpu_s"] = peer["cpu_s"]
    adding = []
    for turn in range(arguments.repeat):  # each with the cache as the last full run left it
        shutil.copytree(scratch / "cache", scratch / f"cache{turn}", copy_function=os.link)
        adding.append(run("prepare", base, more, scratch / f"added{turn}", scratch / f"cache{turn}"))
        shutil.rmtree(scratch / f"cache{turn}")
    anew = run("prepare", base, more, scratch / "anew", scratch / "cache-of-its-own")
    made = {(scratch / f"added{turn}/manifest.json").read_bytes() for turn in range(arguments.repeat)}
    same = made == {(scratch / "anew/manifest.json").read_bytes()}
    figures |= {"more_cpu_s": statistics.median(each["cpu_s"] for each in adding), "more_anew_cpu_s": anew["cpu_s"]}
    figures |= {
        "more_s": statistics.median(each["seconds"] for each in adding),
        "more_all_s": [e["seconds"] for e in adding],
    }
    figures |= {"more_anew_s": anew["seconds"], "more_same_bytes": same}
    if arguments.near:
        figures["near"] = measure_near(scratch, base, arguments.near, arguments.repeat)
    if arguments.large:
        figures |= measure_large(scratch, base, arguments.large)
    if arguments.validate:
        figures["validate"] = measure_validation(scratch, arguments.validate, arguments.repeat)
    return figures


def measure_llama_factory(scratch: Path, rows: Path, python: Path) -> dict[str, float]:
    """LLaMA-Factory's time for the same conversations, as JSON Lines."""
    import pyarrow.parquet as pq

    folder = scratch / "llamafactory"
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for messages in pq.read_table(rows / "rows.parquet", columns=["messages"])["messages"].to_pylist():
            file.write(json.dumps({"messages": messages}) + "\n")
    script = ROOT / "bench/llama_factory.py"
    return run(script.stem, scratch / "weights", folder / "rows.jsonl", folder / "out", command=[python, script])


def measure_near(scratch: Path, base: Path, number: int, repeat: int) -> dict[str, Any]:
    """Prepare recombined rows with and without a search for near duplicates, and count which planted copies it found."""
    import pyarrow.parquet as pq

    rows, planted = make_recombined(scratch / "recombined", number)
    seen: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for turn in range(repeat):
        for name, threshold in (("without", ""), ("with", str(NEAR))):
            out, cache = scratch / f"{name}-{turn}", scratch / f"cache-{name}-{turn}"
            seen[name].append(run("prepare", base, rows, out, cache, threshold))
            shutil.rmtree(cache)
    ids = pq.read_table(rows / "rows.parquet", columns=["row_id"])["row_id"].to_pylist()
    place = {row_id: i for i, row_id in enumerate(ids)}
    trained = {
        name: {
            place[row_id]
            for path in (scratch / f"{name}-0").glob("train_rows-*.parquet")
            for row_id in pq.read_table(path, columns=["row_id"])["row_id"].to_pylist()
        }
        for name in seen
    }
    gone = trained["without"] - trained["with"]
    bins: dict[str, list[int]] = {}
    for one, other, index in planted:
        if one in trained["without"] and other in trained["without"]:
            low = min(int(index * 20) / 20, 0.95)
            bins.setdefault(f"{low:.2f} to {low + 0.05:.2f}", []).append(int(one in gone or other in gone))
    members = {i for one, other, _ in planted for i in (one, other)}
    return {
        "rows": number,
        "without_s": statistics.median(each["seconds"] for each in seen["without"]),
        "with_s": statistics.median(each["seconds"] for each in seen["with"]),
        "without_mb": max(each["peak_mb"] for each in seen["without"]),
        "with_mb": max(each["peak_mb"] for each in seen["with"]),
        "threshold": NEAR,
        "found_by_index": {name: f"{sum(hits)} of {len(hits)}" for name, hits in sorted(bins.items())},
        "others_left_out": len(gone - members),
    }


def measure_large(scratch: Path, base: Path, number: int) -> dict[str, Any]:
    """Prepare a tenth of the rows and all of them, to compare memory; each again with 1 % more and the cache."""
    figures: dict[str, Any] = {}
    for name, count in (("tenth", number // 10), ("large", number)):
        cache = scratch / f"cache-{name}"
        full = run("prepare", base, make_rows(scratch / name, count), scratch / f"out-{name}", cache)
        more = make_rows(scratch / f"more-{name}", count + count // 100)
        added = run("prepare", base, more, scratch / f"added-{name}", cache)
        figures[name] = {key: full[key] for key in ("seconds", "cpu_s", "peak_mb")} | {"rows": count}
        figures[name] |= {f"more_{key}": added[key] for key in ("seconds", "cpu_s", "peak_mb")}
        for folder in (cache, more, *(scratch / f"{stem}{name}" for stem in ("", "out-", "added-"))):
            shutil.rmtree(folder)
    return figures


def measure_validation(scratch: Path, number: int, repeat: int) -> dict[str, Any]:
    """Validate a tenth of the clean rows, then by turns all of them and rows of which every twentieth is broken."""
    figures: dict[str, Any] = {"rows": number}
    kinds = {"tenth": (number // 10, 0), "clean": (number, 0), "broken": (number, 20)}
    for name, (rows, broken) in kinds.items():
        size = make_raw(scratch / f"raw-{name}/data/raw/rows.jsonl", rows, broken)
        figures[name] = {"mb": round(size / 1e6)}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for turn in range(repeat):
        for name in ("clean", "broken") if turn else kinds:
            seen[name].append(run("validate", scratch / f"raw-{name}", scratch / f"validated-{name}"))
    for name, found in seen.items():
        figures[name] |= {
            key: statistics.median(each[key] for each in found) for key in ("seconds", "cpu_s", "peak_mb")
        }
        figures[name]["all_s"] = [each["seconds"] for each in found]
        report = json.loads((scratch / f"validated-{name}/report.json").read_text())
        figures[name]["quarantined"] = report["rows_quarantined"]
        shutil.rmtree(scratch / f"raw-{name}")
    return figures


def judge(figures: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the ratios, and each goal with what was measured."""
    ratios = {
        "ours_over_floor": figures["ours_s"] / figures["floor_s"],
        "ours_over_floor_once": figures["ours_s"] / figures["floor_once_s"],
        "more_over_full": figures["more_s"] / figures["more_anew_s"],
    }
    goals = [
        goal("preparation over the bare tokenizer's time, one call", "at most", 1.25, ratios["ours_over_floor_once"]),
        goal("the same, in the bare tokenizer's fastest batches", "at most", 1.25, ratios["ours_over_floor"]),
        goal("1 % more rows over the time of all", "at most", 0.06, ratios["more_over_full"]),
        goal("output of an increment that differs", "at most", 0, float(not figures["more_same_bytes"])),
    ]
    if "trl_s" in figures:
        ratios["trl_over_ours"] = figures["trl_s"] / figures["ours_s"]
        goals.append(goal("TRL's time over ours", "at least", 2.5, ratios["trl_over_ours"]))
    if "llamafactory_s" in figures:
        ratios["llamafactory_over_ours"] = figures["llamafactory_s"] / figures["ours_s"]
    if found := figures.get("near"):
        ratios["near_over_without"] = found["with_s"] / found["without_s"]
        goals.append(goal("time with near duplicates over that without", "at most", 1.6, ratios["near_over_without"]))
        goals.append(goal("rows left out that are no copies", "at most", 0, found["others_left_out"]))
    if "large" in figures:
        ratios["memory"] = figures["large"]["peak_mb"] / figures["tenth"]["peak_mb"]
        ratios["large_more_over_full"] = figures["large"]["more_seconds"] / figures["large"]["seconds"]
        goals.append(goal("the same of the larger number of rows", "at most", 0.06, ratios["large_more_over_full"]))
        goals.append(goal("memory for ten times the rows, preparation", "at most", 1.3, ratios["memory"]))
    if found := figures.get("validate"):
        ratios["validate_memory"] = found["clean"]["peak_mb"] / found["tenth"]["peak_mb"]
        ratios["failing_over_passing"] = found["broken"]["seconds"] / found["clean"]["seconds"]
        goals += [
            goal("validation, s", "at most", 90, found["clean"]["seconds"]),
            goal("validation, MB", "at most", 1500, found["clean"]["peak_mb"]),
            goal("memory for ten times the rows, validation", "at most", 1.3, ratios["validate_memory"]),
            goal("failing rows' time over passing ones'", "at most", 1.1, ratios["failing_over_passing"]),
        ]
    return {name: round(value, 3) for name, value in ratios.items()}, goals


def goal(name: str, how: str, wanted: float, measured: float) -> dict[str, Any]:
    """One goal."""
    met = measured <= wanted if how == "at most" else measured >= wanted
    return {"name": name, "wanted": f"{how} {wanted}", "measured": round(measured, 3), "met": met}


def run(part: str, *arguments: object, path: Path | None = None, command: list[Path] | None = None) -> dict[str, float]:
    """Run a part in a process of its own; its wall seconds, its own clock, and the memory of it and all below it.

    Args:
        part: one of `PARTS`, or what `command` is called.
        arguments: of the part.
        path: a folder of further packages.
        command: an interpreter and a script of another environment.
    """
    import psutil

    found = [] if command else [ROOT, path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(each) for each in found if each)}
    began, used = time.monotonic(), children_cpu()
    process = subprocess.Popen(
        [*map(str, command or [sys.executable, __file__, part]), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss - each.memory_info().shared for each in family))
            except psutil.Error:
                continue
            finally:
                time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, errors = process.communicate()
    seconds = time.monotonic() - began
    watcher.join()
    cpu = children_cpu() - used
    if process.returncode:
        raise SystemExit(f"{part} ended with {process.returncode}:\n{errors[-3000:]}")
    print(f"{part} {seconds:.1f} s, {cpu:.1f} s of CPU, {peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
    own = [line for line in printed.splitlines() if line.startswith("own ")]
    return {
        "seconds": round(seconds, 2),
        "own_s": round(float(own[-1].split()[1]) if own else seconds, 2),
        "own_cpu_s": round(float(own[-1].split()[2]) if own and own[-1].count(" ") > 1 else cpu, 2),
        "cpu_s": round(cpu, 2),
        "peak_mb": round(peak / 1e6),
    }


def children_cpu() -> float:
    """CPU seconds of all processes that ended: what a busy machine does not change much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_base(scratch: Path) -> Path:
    """Make the output of the stage `model` for a tokenizer trained on GSM8K and weights that nobody reads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from regraft.artifacts import commit_dir, digest_json
    from regraft.model.pin import TOKENIZER_FILES, digest_files
    from regraft.model.report import BaseReport

    rust = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator([text for pair in questions() for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    weights = scratch / "weights"
    tokenizer.save_pretrained(weights)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    with commit_dir(scratch / "model") as folder:
        BaseReport(
            source="folder",
            base=str(weights),
            name="bench",
            revision=None,
            path=str(weights),
            digest="0" * 64,
            tokenizer_digest=digest_json(digest_files(weights, TOKENIZER_FILES)),
            files={},
            parameters=0,
            dtype="float32",
            architecture="LlamaForCausalLM",
        ).save(folder / "report.json")
    return scratch / "model"


def questions() -> list[tuple[str, str]]:
    """GSM8K's training questions and answers."""
    with (SHARED / "data/gsm8k/train.jsonl").open(encoding="utf-8") as file:
        return [(row["question"], row["answer"]) for row in map(json.loads, file)]


def make_rows(folder: Path, number: int) -> Path:
    """Write `rows.parquet` as `validate` does; the first 200,000 rows are one source, each further 200,000 another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from regraft.artifacts import canonical_json
    from regraft.validate.quarantine import ROWS

    pairs = questions()
    folder.mkdir()
    with pq.ParquetWriter(folder / "rows.parquet", ROWS, compression="zstd") as writer:
        for first in range(0, number, 10_000):
            rows = []
            for i in range(first, min(first + 10_000, number)):
                messages = talk(i, pairs)
                content = canonical_json({"messages": messages, "slices": {}})
                row_id = hashlib.sha256(content).hexdigest()[:32]
                source, line = f"data/raw/{i // 200_000:03}.jsonl", i % 200_000 + 1
                rows.append({"row_id": row_id, "source": source, "line": line, "messages": messages, "slices": []})
            writer.write_table(pa.Table.from_pylist(rows, ROWS), row_group_size=10_000)
    return folder


def talk(i: int, pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Row `i`: a numbered question and its answer."""
    question, answer = pairs[i % len(pairs)]
    return [{"role": "user", "content": f"{i}. {question}"}, {"role": "assistant", "content": answer}]


def make_recombined(folder: Path, number: int) -> tuple[Path, list[tuple[int, int, float]]]:
    """Write rows whose sentences come from different rows of GSM8K; every fiftieth is a copy of another with some words changed.

    Returns:
        The folder, and of each copy: the row that it copies, itself, and the Jaccard index of their word pairs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from regraft.artifacts import canonical_json
    from regraft.validate.quarantine import ROWS

    dice = random.Random(0)
    asked = [each for question, _ in questions() for each in re.split(r"(?<=[.?!])\s+", question)]
    said = [each for _, answer in questions() for each in answer.split("\n") if not each.startswith("#")]
    texts, planted = [], []
    for i in range(number):
        if i % 50 == 49:
            source = dice.randrange(i)
            changed = [each.split() for each in texts[source]]
            for _ in range(dice.randint(1, 12)):
                part = dice.choice(changed)
                part[dice.randrange(len(part))] = f"w{dice.randrange(10**6)}"
            texts.append((" ".join(changed[0]), " ".join(changed[1])))
            planted.append((source, i, jaccard(" ".join(texts[source]), " ".join(texts[i]))))
        else:
            texts.append((" ".join(dice.choices(asked, k=4)), " ".join(dice.choices(said, k=4))))
    folder.mkdir()
    with pq.ParquetWriter(folder / "rows.parquet", ROWS, compression="zstd") as writer:
        for first in range(0, number, 10_000):
            rows = []
            for i, (question, answer) in enumerate(texts[first : first + 10_000], first + 1):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                content = canonical_json({"messages": messages, "slices": {}})
                row_id = hashlib.sha256(content).hexdigest()[:32]
                rows.append({"row_id": row_id, "source": "a", "line": i, "messages": messages, "slices": []})
            writer.write_table(pa.Table.from_pylist(rows, ROWS), row_group_size=10_000)
    return folder, planted


def jaccard(one: str, other: str) -> float:
    """The index of two texts' word pairs, exactly; words as `preprocess.near_duplicates` has them."""
    pairs = [set(pairwise(re.findall(r"\w+", text.casefold()))) for text in (one, other)]
    return len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


def make_raw(path: Path, number: int, broken: int) -> int:
    """Write rows as JSONL, every `broken`-th of them with something that the contract refuses; return the bytes."""
    pairs = questions()
    bad = ("ann@example.com", "4111 1111 1111 1111", "sk-" + "a1B2" * 8, "caf\u00c3\u00a9", "\u202eabc", "\x07", "")
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            messages = talk(i, pairs)
            if broken and i % broken == 0:
                kind = bad[i // broken % len(bad)]
                messages[0]["content"] = f"{messages[0]['content']} {kind}" if kind else ""
            file.write(json.dumps({"messages": messages, "id": str(i)}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def part_floor(base: str, rows: str, batch: str) -> None:
    """The bare tokenizer, with so many texts in a call."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    rust = Tokenizer.from_file(str(Path(base).parent / "weights/tokenizer.json"))
    talks = pq.read_table(Path(rows) / "rows.parquet", columns=["messages"])["messages"].to_pylist()
    texts = [
        "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages) for messages in talks
    ]
    del talks
    began, used = time.monotonic(), time.process_time()
    for first in range(0, len(texts), int(batch)):
        rust.encode_batch_fast(texts[first : first + int(batch)], add_special_tokens=False)
    print("own", time.monotonic() - began, time.process_time() - used)


def part_prepare(base: str, rows: str, out: str, cache: str, near: str = "") -> None:
    """Ours; with an index from which rows are near duplicates, if it is given."""
    import logging

    from regraft.preprocess.params import PreprocessParams
    from regraft.preprocess.preprocess import preprocess

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    params = PreprocessParams.model_validate(PARAMS | {"near_duplicates": float(near) if near else None})
    preprocess(params, base=Path(base), rows=Path(rows), out=Path(out), cache=Path(cache))


def part_trl(base: str, rows: str, out: str) -> None:
    """TRL's preparation, as `SFTTrainer` does it before the first step; the model has one small layer."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(base).parent / "weights")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    began = time.monotonic()
    data = datasets.load_dataset(
        "parquet", data_files=str(Path(rows) / "messages.parquet"), split="train", cache_dir=f"{out}-cache"
    )
    arguments = SFTConfig(
        output_dir=out,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=2,
        max_length=512,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = SFTTrainer(LlamaForCausalLM(config), args=arguments, train_dataset=data, processing_class=tokenizer)
    print("own", time.monotonic() - began)
    print(len(trainer.train_dataset), "blocks")


def part_validate(root: str, out: str) -> None:
    """Validation with the default contract."""
    from regraft.validate.params import DataParams, ValidateParams
    from regraft.validate.validate import validate

    data = DataParams.model_validate({"id": "id"})
    docs = Path(out).with_name(Path(out).name + "-docs")
    validate(ValidateParams(), data, raw_root=Path(root), out=Path(out), docs=docs)


PARTS = {"floor": part_floor, "prepare": part_prepare, "trl": part_trl, "validate": part_validate}

if __name__ == "__main__":
    main()
