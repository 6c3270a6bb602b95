"""The model card: what a person who finds the folder has to know, in Hugging Face's format."""

import json
from typing import Any

from regraft.export.report import Candidate, Certificate
from regraft.export.survival import overall
from regraft.gates.verdict import number

_LONGEST = 80  # characters of a value in a table


def model_card(certificate: Certificate, lineage: dict[str, Any], *, licence: str | None, name: str) -> bytes:
    """Return `README.md` of an export.

    Args:
        certificate: with the verdict and the scores.
        lineage: what made the version; its section `data` is shown.
        licence: as the base's card names it, or None where that is not known.
        name: title of the card.
    """
    base = certificate.base
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [regraft, lora, merged]"]
    if base["source"] == "hub":
        front += [f"base_model: {base['name']}", "base_model_relation: finetune"]
    front += [f"license: {licence}"] if licence else []
    data = lineage.get("data")
    lines = [
        *front,
        "---",
        "",
        f"# {name}",
        "",
        f"`{base['name']}` with a LoRA adapter merged into its weights ({certificate.dtype}) by Regraft.",
        "Load it with `transformers`; it needs no adapter and no code of its own.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
        "```",
        "",
        "## Verdict",
        "",
        f"{'Passed' if certificate.verdict.passed else 'Refused'}. These files were loaded from disk in a fresh process and",
        f"compared with the adapter on the base that it was trained on, on {certificate.reference.rows} held-out rows",
        f"({certificate.reference.positions} tokens of answers).",
        "",
        *_table(("check", "measured", "threshold"), [_check(check) for check in certificate.verdict.checks]),
        "",
        f"Merged into: the {certificate.chosen} base; the nearest of these candidates.",
        "",
        *_table(
            ("candidate", "mean KL (nats)", "top-1 agreement", "same answers", "exact match", "delta survival"),
            [_candidate(candidate) for candidate in certificate.candidates],
        ),
        "",
        f"With the adapter on its training base, exact match is {number(certificate.reference.exact_match)}.",
        "",
        "## Made from",
        "",
        *_table(
            ("what", "value"),
            [
                ("version (identity)", certificate.identity),
                ("base", f"{base['name']} ({base['source']})"),
                ("base revision", base["revision"] or "none: pinned by digest"),
                ("base digest", str(base["digest"])),
                ("adapter digest", certificate.adapter_digest),
                ("tokenizer digest", certificate.tokenizer_digest),
                ("holdout digest", certificate.reference.holdout_digest),
                *((f"data: {key}", _short(value)) for key, value in _items(data)),
            ],
        ),
        "",
        "The whole lineage is in `lineage.json`, the figures are in `certificate.json`.",
        f"The base's licence ({licence or 'not named by the base; look where it came from'}) holds for these weights too.",
        "",
        "## Check the files",
        "",
        "```sh",
        "sha256sum -c SHA256SUMS",
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(each) + " |"
        for each in (
            head,
            tuple("---" for _ in head),
            *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows),
        )
    ]


def _check(check: Any) -> tuple[str, str, str]:
    figures = ("none" if value is None else number(value) for value in (check.measured, check.threshold))
    measured, threshold = figures
    return check.name, measured, threshold


def _candidate(candidate: Candidate) -> tuple[str, ...]:
    parity = candidate.parity
    if parity is None:
        return candidate.source, candidate.error or "not measured", "", "", "", ""
    survived = overall(candidate.survival)
    figures = (parity.mean_kl, parity.top1_agreement, parity.same_answers, parity.exact_match, survived)
    return candidate.source, *("not finite" if value is None else number(value) for value in figures)


def _items(data: Any) -> list[tuple[str, Any]]:
    return sorted(data.items()) if isinstance(data, dict) else []


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
