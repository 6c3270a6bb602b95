"""Raw files with all that can be wrong in them, and what a stage made of them."""

import json
import random
from pathlib import Path
from typing import Any

from regraft.artifacts import digest_file


def fill(stage: Any, dice: random.Random) -> None:
    """Write files of several formats, a third of the rows broken, some of them twice."""
    lines = []
    for i in range(600):
        said = dice.choice(["", "me@example.com", "\u202e", "\u043f\u0440\u0438\u0432\u0435\u0442", *["hello"] * 6])
        messages = [{"role": "user", "content": f"{said} {i % 400}"}, {"role": "assistant", "content": "yes"}]
        row = {"messages": messages, "id": f"r{i}", "at": f"2026-09-{1 + i % 30:02}", "kind": f"k{i % 7}"}
        lines.append(
            json.dumps(row).encode() if i % 17 else dice.choice([b"", b"{", b"[]", b"\xff", b'{"messages": 1}'])
        )
    stage.write("a.jsonl", b"\n".join(lines) + b"\n")
    stage.write("b.json", b"[" + b",".join(line for line in lines[:200] if line.startswith(b'{"mess')) + b"]")
    stage.write("empty.jsonl", b"{\n")


def outputs(root: Path) -> dict[str, str]:
    found = [path for name in ("out", "docs") for path in (root / name).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): digest_file(path) for path in found}
