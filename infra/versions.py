"""Write `versions.yaml`: the versions of the libraries that decide a stage's results, from `requirements.lock`.

    python infra/versions.py            write it
    python infra/versions.py --check    exit 1 if it differs

DVC reads it as parameters of the stages, so that a new torch retrains and a new typer does not.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = {
    "data": ("great-expectations", "pandas", "pyarrow", "numpy"),
    "tokens": ("tokenizers", "transformers", "jinja2", "pyarrow"),
    "compute": (
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "safetensors",
        "numpy",
        "pyarrow",
    ),
    "preference": ("trl",),
    "text": ("py3langid", "presidio-analyzer", "spacy"),
}


def render() -> str:
    """Return the content of `versions.yaml`; a package locked at two versions (by Python) shows both."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==([^ \\;]+)", lock, flags=re.MULTILINE):
        pins.setdefault(name, set()).add(version)
    lines = ["# Made from requirements.lock by `make lock`: versions whose change makes a stage run again. Don't edit."]
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f'  {name}: "{" or ".join(sorted(pins[name]))}"' for name in names]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check the file."""
    path = ROOT / "versions.yaml"
    if "--check" in sys.argv:
        return int(path.read_text(encoding="utf-8") != render())
    path.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
