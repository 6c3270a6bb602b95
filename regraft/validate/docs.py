"""The data docs: one page of ours that says what was found, and Great Expectations' pages, readable without a network.

Great Expectations' pages name scripts, styles and a logo on other hosts, and times; both are taken out, so that opening
them sends nothing, and equal data makes equal pages. They hold counts and thresholds, never a row's text.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from regraft.validate.params import Reason
from regraft.validate.report import ValidateReport

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { border-bottom: 1px solid #ccc; padding: .3em .8em;
text-align: left; vertical-align: top } .n { text-align: right } .yes { color: #176b2c } .no { color: #b00020;
font-weight: bold } .warn { color: #8a5a00; font-weight: bold } .ge-walkthrough-modal, .modal { display: none }
nav ol { display: inline } .tooltip-text, .cooltip .top, button, .btn, a[data-toggle] { display: none }
.text-success::before { content: "yes" } .text-danger::before { content: "no"; font-weight: bold }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd } .yes { color: #6fcf8a }
.no { color: #ff7b8a } .warn { color: #e0b050 } a { color: #8ab4f8 } }
"""
_REMOTE = (
    re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL),
    re.compile(r"<link\b[^>]*>", re.DOTALL),
    re.compile(r"<style\b[^>]*>.*?</style>", re.DOTALL),
    re.compile(r"<img\b[^>]*>", re.DOTALL),
    re.compile(r"<p>Stay current on everything GX.*?</p>", re.DOTALL),
)
_STAMP = re.compile(r"(?!20000101T000000\.000000Z)\d{8}T\d{6}\.\d{6}Z")
_MADE_UP_TIME = re.compile(r"2000-01-01[T ]00:00:00(\+00:00|Z| UTC)")
_RANDOM_ID = re.compile(r"-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


def finish(site: Path, report: ValidateReport, places: Mapping[Reason, Sequence[str]]) -> None:
    """Turn the folder that Great Expectations wrote into pages without network and times, with our own first page.

    Args:
        site: the folder; gets index.html, style.css and report.json.
        report: what was found.
        places: for each reason, the first few `source:line` where it occurs.
    """
    shutil.rmtree(site / "static", ignore_errors=True)
    (site / "index.html").unlink(missing_ok=True)
    (site / "style.css").write_text(_STYLE, encoding="utf-8")
    pages = sorted(site.rglob("*.html"))
    for page in pages:
        depth = len(page.relative_to(site).parts) - 1
        page.write_text(_without_network(page.read_text(encoding="utf-8"), "../" * depth), encoding="utf-8")
    links = [page.relative_to(site).as_posix() for page in pages]
    (site / "index.html").write_text(_index(report, places, links), encoding="utf-8")
    report.save(site / "report.json")


def _without_network(page: str, up: str) -> str:
    for pattern in _REMOTE:
        page = pattern.sub("", page)
    for pattern in (_STAMP, _MADE_UP_TIME, _RANDOM_ID):
        page = pattern.sub("", page)
    page = page.replace("</head>", f'<link rel="stylesheet" href="{up}style.css"></head>', 1)
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _index(report: ValidateReport, places: Mapping[Reason, Sequence[str]], links: Sequence[str]) -> str:
    verdict = '<span class="yes">passed</span>' if report.passed else '<span class="no">blocked</span>'
    expectations = [
        (
            _mark(each.passed, each.level),
            escape(each.name),
            each.level,
            _number(each.measured),
            _number(each.threshold),
            f"{each.rows:,}",
            escape(each.detail),
        )
        for each in report.expectations
    ]
    reasons = [
        (escape(reason), f"{count:,}", escape(", ".join(places.get(Reason(reason), ()))))
        for reason, count in report.quarantined_by_reason.items()
    ]
    files = [
        (escape(name), f"{each.rows:,}", f"{each.quarantined:,}", escape(each.problem or ""), each.sha256[:16])
        for name, each in report.files.items()
    ]
    slices = [
        (escape(name), escape(value), f"{count:,}")
        for name, values in report.slices.items()
        for value, count in values.items()
    ]
    forgotten = f", {report.rows_forgotten:,} forgotten" if report.rows_forgotten else ""
    parts = [
        f"<h1>Data: {verdict}</h1>",
        f"<p>{report.rows_in:,} rows read, {report.rows_out:,} accepted, {report.rows_quarantined:,} quarantined, "
        f"{report.rows_duplicate:,} duplicates{forgotten}. Data digest {report.data_digest[:16]}.</p>",
        "<h2>Expectations</h2>",
        _table(("", "name", "level", "measured", "threshold", "rows", "detail"), expectations),
        "<h2>Quarantined</h2>",
        _table(("reason", "rows", "the first of them"), reasons),
        "<h2>Files</h2>",
        _table(("file", "rows", "quarantined", "problem", "sha256"), files),
        "<h2>Slices</h2>",
        _table(("slice", "value", "accepted rows"), slices),
        "<h2>Great Expectations</h2>",
        "<ul>" + "".join(f'<li><a href="{escape(link)}">{escape(link)}</a></li>' for link in links) + "</ul>",
    ]
    head = '<meta charset="utf-8"><title>Data docs</title><link rel="stylesheet" href="style.css">'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _mark(passed: bool, level: str) -> str:
    if passed:
        return '<span class="yes">yes</span>'
    return f'<span class="{"no" if level == "block" else "warn"}">no</span>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "<p>none</p>"
    top = "".join(f"<th>{each}</th>" for each in head)
    body = "\n".join("<tr>" + "".join(f"<td>{each}</td>" for each in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>\n{body}</table>"
