"""`regraft data page`: what became of the data, on one page that needs no network: where every row went, lengths, slices, drift.

It holds counts and names of files, slices and their values, never a row's text. Equal data gives equal bytes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import digest_bytes, write_file
from regraft.errors import DamagedArtifact, MissingInput
from regraft.gates.drift import judge_drift
from regraft.gates.profile import NAME as PROFILE
from regraft.gates.profile import Profile, profile
from regraft.layout import Layout
from regraft.preprocess.report import PreprocessReport
from regraft.register.fetch import read_file
from regraft.register.lookup import champion
from regraft.register.version import Version
from regraft.settings import Settings
from regraft.validate.report import ValidateReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "summary.html"
_VALUES = 16  # of a slice or part, shown
_PARTS = 12  # slices or parts, shown
_NEW, _OLD, _HELD = "#3b76b0", "#b7b7b7", "#e0a03c"
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; color: #222;
background: #fff } table { border-collapse: collapse; margin: .5em 0 } th, td { border-bottom: 1px solid #ddd;
padding: .2em .8em; text-align: left; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
.no { color: #b00020; font-weight: bold } svg { max-width: 100%; height: auto } tr.sum td { font-weight: bold }
"""


def write_summary(layout: Layout, settings: Settings, out: Path) -> list[str]:
    """Write the page and return what it says in a few lines.

    Args:
        layout: the clone; `validate` has run.
        settings: its parameters.
        out: the file; replaced whole.

    Raises:
        MissingInput: `validate` has not run.
        DamagedArtifact: a report is unreadable.
        ServiceUnavailable: the registry does not answer.
    """
    rows = ValidateReport.load(layout.stage("validate") / "report.json")
    prepared = _prepared(layout, rows)
    steps = flow(rows, prepared)
    present = profile(layout.stage("validate") / "rows.parquet")
    version = champion(settings.register_, layout)
    former = None if version is None else _profile_of(version)
    verdict = judge_drift(settings.gates.drift, present, former, judged={})

    said = [
        f"{rows.rows_in:,} rows read, {rows.rows_out:,} accepted"
        + (
            "" if prepared is None else f", {prepared.counts.train:,} to train on, {prepared.counts.holdout:,} held out"
        ),
        *(
            f"{each.name}: measured {each.measured:g}, threshold {each.threshold:g}"
            for each in rows.expectations
            if not each.passed
        ),
        *(check.detail for check in verdict.checks if former is not None and not check.passed),
    ]
    parts = [
        "<h1>The data</h1>",
        f"<p>{escape(said[0])}. Digest {rows.data_digest[:16]}; times {escape(rows.time.first or 'none')} to "
        f"{escape(rows.time.last or 'none')}.</p>",
        "<h2>Where every row went</h2>",
        _steps(steps),
        *_benchmarks(prepared),
        "<h2>Expectations that were not met</h2>",
        _expectations(rows),
        "<h2>Lengths</h2>",
        _svg(_lengths(layout, prepared)) if prepared is not None else "<p>`preprocess` has not run on these rows.</p>",
        "<h2>Slices</h2>",
        _slices(rows, prepared),
        "<h2>Drift</h2>",
        _drift(present, former, version, [check.detail for check in verdict.checks]),
    ]
    head = f'<meta charset="utf-8"><title>The data</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_file(out, page.encode())
    return said


def flow(rows: ValidateReport, prepared: PreprocessReport | None) -> list[tuple[str, int]]:
    """Return where every row that was read went: names and counts, which add up to the rows that were read.

    Raises:
        DamagedArtifact: they do not.
    """
    steps = [("quarantined", rows.rows_quarantined), ("forgotten", rows.rows_forgotten)]
    if prepared is None:
        steps.append(("accepted", rows.rows_out))
    else:
        counts = prepared.counts
        steps += [
            ("deduplicated: equal to another row of their side", counts.deduplicated),
            ("left out: their prompt is held out", counts.leaked),
            ("left out: their prompt is nearly a held-out one", counts.near_holdout),
            ("decontaminated: a long run of words of the holdout", counts.contaminated),
            ("decontaminated: a long run of words of a benchmark", counts.decontaminated),
            ("deduplicated: nearly equal to an earlier row", counts.near_duplicates),
            ("too long", counts.too_long),
            ("nothing to train on", counts.nothing_to_train),
            ("left out for their age", counts.aged),
            ("left out by the mixture of sources", counts.sampled),
            ("trained on", counts.train),
            ("held out", counts.holdout),
        ]
    if (found := sum(count for _, count in steps)) != rows.rows_in:
        raise DamagedArtifact(
            f"{rows.rows_in:,} rows were read, and the reports account for {found:,}", fix="regraft preprocess"
        )
    return steps


def _prepared(layout: Layout, rows: ValidateReport) -> PreprocessReport | None:
    """Return the report of `preprocess` if it is about these rows."""
    try:
        found = PreprocessReport.load(layout.stage("preprocess") / "report.json")
    except MissingInput:
        return None
    return found if found.counts.rows_in == rows.rows_out else None


def _profile_of(version: Version) -> Profile | None:
    """Return the profile that was registered with a version, checked; None where it has none."""
    manifest = read_file(version, "manifest.json")
    if digest_bytes(manifest) != version.manifest_digest:
        raise DamagedArtifact(f"{version.label()}: its manifest differs from the digest in its tag")
    listed = json.loads(manifest)["files"].get(PROFILE)
    if listed is None:
        return None
    data = read_file(version, PROFILE)
    if digest_bytes(data) != listed["sha256"]:
        raise DamagedArtifact(f"{version.label()}: {PROFILE} differs from its manifest")
    return Profile.model_validate_json(data)


def _steps(steps: Sequence[tuple[str, int]]) -> str:
    total = sum(count for _, count in steps)
    lines = [
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td><td class="n">{_share(count, total)}</td></tr>'
        for name, count in steps
        if count or name in ("trained on", "held out", "quarantined", "accepted")
    ]
    lines.append(f'<tr class="sum"><td>rows read</td><td class="n">{total:,}</td><td class="n"></td></tr>')
    return "<table>" + "\n".join(lines) + "</table>"


def _benchmarks(prepared: PreprocessReport | None) -> list[str]:
    if prepared is None or not prepared.benchmarks:
        return []
    lines = [
        f'<tr><td>{escape(name)}</td><td class="n">{rows:,}</td></tr>' for name, rows in prepared.benchmarks.items()
    ]
    return ["<h2>Benchmarks</h2>", "<table><tr><th>file</th><th>training rows like it</th></tr>", *lines, "</table>"]


def _expectations(rows: ValidateReport) -> str:
    failed = [each for each in rows.expectations if not each.passed]
    if not failed:
        return f"<p>All {len(rows.expectations)} were met.</p>"
    lines = [
        f'<tr><td class="no">{escape(each.level)}</td><td>{escape(each.name)}</td><td class="n">{each.measured:g}</td>'
        f'<td class="n">{each.threshold:g}</td><td>{escape(each.detail)}</td></tr>'
        for each in failed
    ]
    head = "<tr><th></th><th>name</th><th>measured</th><th>threshold</th><th></th></tr>"
    return "<table>" + head + "\n".join(lines) + "</table>"


def _lengths(layout: Layout, prepared: PreprocessReport) -> "Figure":
    """Draw how many tokens training rows have, and how many of them are learned."""
    import numpy as np
    import pyarrow.parquet as pq

    figure, (axes,) = _figure(1, 1, 9, 2.6)
    edges = np.linspace(0, prepared.max_length, 61)
    found = {"tokens": np.zeros(60), "trained_tokens": np.zeros(60)}
    for path in sorted(layout.stage("preprocess").glob("train_rows-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(65_536, columns=list(found), use_threads=False):
                for name, counts in found.items():
                    counts += np.histogram(batch[name].to_numpy(), edges)[0]
    axes.stairs(found["tokens"], edges, fill=True, color=_NEW, alpha=0.7, label="tokens")
    axes.stairs(found["trained_tokens"], edges, color=_HELD, linewidth=1.5, label="of them learned")
    axes.axvline(prepared.max_length, color="gray", linestyle=":", label="max_length")
    axes.set(xlabel="tokens of a training row", ylabel="rows")
    axes.legend()
    return figure


def _slices(rows: ValidateReport, prepared: PreprocessReport | None) -> str:
    names = sorted(rows.slices)[:_PARTS]
    if not names:
        return "<p>data.slices names none.</p>"
    figure, grid = _figure(len(names), 3, 3.3, 2.6)
    for axes, name in zip(grid, names, strict=False):
        values = _most(rows.slices[name])
        if prepared is None:
            _bars(axes, values, [(rows.slices[name], _NEW, "accepted")])
        else:
            trained, held = (side.get(name, {}) for side in (prepared.train_slices, prepared.holdout_slices))
            _bars(axes, values, [(trained, _NEW, "trained on"), (held, _HELD, "held out")], stacked=True)
        axes.set_title(_short(name))
    if grid:
        grid[0].legend(fontsize=7, loc="lower right")
    left_out = f"<p>{len(rows.slices) - _PARTS} more slices are not shown.</p>" if len(rows.slices) > _PARTS else ""
    return _svg(figure) + left_out


def _drift(present: Profile, former: Profile | None, version: Version | None, told: Sequence[str]) -> str:
    if former is None or version is None:
        return "<p>There is no champion whose data could be compared with.</p>"
    names = [name for name in sorted(set(present.parts) & set(former.parts)) if name != "words"][:_PARTS]
    figure, grid = _figure(max(len(names), 1), 3, 3.3, 2.6)
    for axes, name in zip(grid, names, strict=False):
        new, old = present.parts[name], former.parts[name]
        values = _most(Counter(new) + Counter(old))
        if name.endswith("length"):
            values.sort(key=lambda value: int(value) if value.isdigit() else -1)
        _bars(axes, values, [(_shares(new), _NEW, "now"), (_shares(old), _OLD, f"version {version.number}")])
        axes.set_title(_short(name))
    if names:
        grid[0].legend(fontsize=7, loc="lower right")
    lines = "".join(f"<li>{escape(each)}</li>" for each in told)
    return f"<p>Shares of rows now, and of those that {escape(version.label())} learnt from.</p>{_svg(figure)}<ul>{lines}</ul>"


def _bars(
    axes: Any, values: Sequence[str], series: Sequence[tuple[Mapping[str, float], str, str]], *, stacked: bool = False
) -> None:
    import numpy as np

    places = np.arange(len(values), dtype=float)
    height = 0.8 if stacked else 0.8 / len(series)
    before = np.zeros(len(values))
    for i, (counts, color, label) in enumerate(series):
        own = np.array([float(counts.get(value, 0)) for value in values])
        at = places if stacked else places + (i - (len(series) - 1) / 2) * height
        axes.barh(at, own, height, left=before if stacked else None, color=color, label=label)
        before += own
    axes.set_yticks(places, [_short(value) for value in values], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)


def _most(counts: Mapping[str, int]) -> list[str]:
    return [value for value, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:_VALUES]]


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {value: count / total for value, count in counts.items()}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _short(text: str) -> str:
    return (text if len(text) <= 24 else f"{text[:21]}...").replace("$", r"\$")


def _figure(count: int, columns: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasSVG(figure)
    grid = [axes for line in figure.subplots(rows, columns, squeeze=False) for axes in line]
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def _svg(figure: "Figure") -> str:
    """Return a figure as SVG to be set into a page: no time, no random names, text as text."""
    import matplotlib as mpl

    content = StringIO()
    with mpl.rc_context({"svg.hashsalt": "regraft", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]
