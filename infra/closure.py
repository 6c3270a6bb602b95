"""The code that a stage runs: its import closure within regraft/, which `dvc.yaml` lists as the stage's deps.

    python infra/closure.py            print each stage's closure
    python infra/closure.py --write    rewrite the code deps in dvc.yaml

Imports inside functions count, so does every package's `__init__.py` on the way.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("model", "validate", "preprocess", "train", "evaluate")


def closure(entry: Path, root: Path = ROOT) -> list[str]:
    """Return the files of regraft/ that a module imports, directly or not, itself included; sorted, relative."""
    found: set[Path] = set()
    queue = [entry]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        queue += [p / "__init__.py" for p in path.parents if (p / "__init__.py").is_file() and root in p.parents]
        for name in imported(path):
            if name.split(".")[0] == "regraft":
                queue += _files(name, root)
    return sorted(path.relative_to(root).as_posix() for path in found)


def imported(path: Path) -> set[str]:
    """Return every module that a file names in an import; `from a import b` gives both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files(name: str, root: Path) -> list[Path]:
    base = root.joinpath(*name.split("."))
    return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]


def stage_code(stage: str) -> list[str]:
    """Return the code deps of a stage; of the modules that it starts as processes of their own, too."""
    package = ROOT / "regraft" / stage
    return closure(package / "__main__.py")


def rewrite(text: str) -> str:
    """Return the text of `dvc.yaml` with every stage's code deps made right; other deps stay."""
    for stage in STAGES:
        block = re.search(rf"(?ms)^  {stage}:\n(?:    .*\n|\n)+", text)
        assert block is not None, f"dvc.yaml has no stage {stage}"
        body = re.sub(r"(?m)^      - regraft/.*\n", "", block.group())
        lines = "".join(f"      - {name}\n" for name in stage_code(stage))
        text = text.replace(block.group(), body.replace("    deps:\n", "    deps:\n" + lines, 1))
    return text


def main() -> None:
    """Print or write."""
    if "--write" in sys.argv:
        path = ROOT / "dvc.yaml"
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for stage in STAGES:
        print(f"{stage}:", *stage_code(stage), sep="\n  ")  # noqa: T201


if __name__ == "__main__":
    main()
