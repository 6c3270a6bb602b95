"""The page about the data: where every row went, and pictures; no row's text, no network, the same bytes."""

import json
import re
from pathlib import Path
from typing import Any

import clones
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regraft import settings
from regraft.artifacts import commit_dir
from regraft.errors import DamagedArtifact, MissingInput
from regraft.layout import Layout
from regraft.preprocess.report import Counts, PreprocessReport, Supervision
from regraft.register import registry
from regraft.register.promote import promote
from regraft.settings import Settings
from regraft.summary import flow, write_summary
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.report import ValidateReport
from regraft.validate.validate import validate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return settings.load(Layout(ROOT)).model_copy(update={"register_": clones.PARAMS})


def accepted(root: Path, rows: int = 40, kind: str = "<b>x</b>") -> ValidateReport:
    (root / "data/raw").mkdir(parents=True, exist_ok=True)
    said = [
        {
            "messages": [{"role": "user", "content": f"secret question {i}"}, {"role": "assistant", "content": "no"}],
            "kind": kind if i % 3 else "other",
        }
        for i in range(rows)
    ]
    (root / "data/raw/a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said) + "{\n")
    params = ValidateParams.model_validate(
        {
            "expectations": {
                "files": {"level": "warn"},
                "duplicates": {"share": 0},
                "quarantined": {"level": "warn", "share": 0.001},
            }
        }
    )
    data = DataParams(slices=["kind"])  # type: ignore[arg-type]
    out = Layout(root).stage("validate")
    return validate(params, data, raw_root=root, out=out, docs=root / "data/work/docs")


def prepared(root: Path, rows: int, **more: Any) -> PreprocessReport:
    left = rows - 4 - sum(more.get("counts", {}).values())
    counts = Counts(
        rows_in=rows,
        train=left,
        holdout=4,
        deduplicated=0,
        leaked=0,
        too_long=0,
        nothing_to_train=0,
        **more.get("counts", {}),
    )
    zero: dict[str, Any] = dict.fromkeys(Supervision.model_fields, 0)
    report = PreprocessReport(
        counts=counts, supervision=Supervision(**zero), benchmarks=more.get("benchmarks", {}),
        holdout_slices={"kind": {"other": 4}}, train_slices={"kind": {"other": 10, "<b>x</b>": left - 10}}, max_length=64,
        supervise="assistant", blocks=1, block_length=64, block_fill=1.0, longest_block=1, stop_token_ids=[],
        template_digest="", tokenizer_digest="", base="", rows_digest="", train_digest="", holdout_digest="",
    )  # fmt: skip
    with commit_dir(Layout(root).stage("preprocess")) as folder:
        report.save(folder / "report.json")
        table = pa.table(
            {"tokens": pa.array([30] * left, pa.int32()), "trained_tokens": pa.array([7] * left, pa.int32())}
        )
        pq.write_table(table, folder / "train_rows-00000.parquet")
    return report


def cells(page: str) -> dict[str, str]:
    return dict(re.findall(r'<tr[^>]*><td>([^<]+)</td><td class="n">([\d,]+)</td>', page))


def test_the_page_says_where_every_row_went(tmp_path: Path, loaded: Settings) -> None:
    accepted(tmp_path)
    prepared(
        tmp_path, 40, counts={"decontaminated": 3, "near_duplicates": 2, "sampled": 1}, benchmarks={"gsm8k.jsonl": 3}
    )
    said = write_summary(Layout(tmp_path), loaded, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    found = cells(page)
    total = found.pop("rows read")
    assert found.pop("gsm8k.jsonl") == "3"
    assert (total, sum(int(count) for count in found.values())) == ("41", 41)
    assert found["trained on"] == "30"
    assert found["decontaminated: a long run of words of a benchmark"] == "3"
    assert said[0] == "41 rows read, 40 accepted, 30 to train on, 4 held out"
    assert any(line.startswith("quarantined: measured 0.02") for line in said)
    assert page.count("<svg") == 2
    assert "There is no champion" in page


def test_nothing_of_a_row_and_nothing_of_another_host_is_in_it_and_its_bytes_repeat(
    tmp_path: Path, loaded: Settings
) -> None:
    accepted(tmp_path)
    prepared(tmp_path, 40)
    for name in ("one.html", "two.html"):
        write_summary(Layout(tmp_path), loaded, tmp_path / name)
    page = (tmp_path / "one.html").read_text()
    assert page == (tmp_path / "two.html").read_text()
    assert "secret question" not in page
    assert "<b>x</b>" not in page
    assert not re.findall(r'(?:src|href)="(?!#)|@import|url\((?!#)', page)
    assert "<script" not in page
    assert str(tmp_path) not in page


def test_before_preprocess_has_run_on_these_rows_it_says_so(tmp_path: Path, loaded: Settings) -> None:
    with pytest.raises(MissingInput):
        write_summary(Layout(tmp_path), loaded, tmp_path / "page.html")
    accepted(tmp_path)
    write_summary(Layout(tmp_path), loaded, tmp_path / "page.html")
    assert "has not run on these rows" in (tmp_path / "page.html").read_text()
    prepared(tmp_path, 39)
    write_summary(Layout(tmp_path), loaded, tmp_path / "page.html")
    assert cells((tmp_path / "page.html").read_text())["accepted"] == "40"


def test_reports_that_do_not_account_for_every_row_are_refused(tmp_path: Path) -> None:
    report = accepted(tmp_path)
    with pytest.raises(DamagedArtifact, match="41 rows were read, and the reports account for 40"):
        flow(report, prepared(tmp_path, 39))


def test_drift_is_drawn_against_what_the_champion_learnt_from(tmp_path: Path, loaded: Settings) -> None:
    from regraft.register.service import initialise, prepare_mlflow

    root = tmp_path / "clone"
    prepare_mlflow(2)
    root.mkdir()
    initialise(root / "mlflow.db")
    layout = clones.make(root, rows=200)
    registry.register(clones.PARAMS, layout=layout, resolved=clones.RESOLVED)
    promote(clones.PARAMS, layout)
    accepted(root, 200)
    prepared(root, 200)
    said = write_summary(layout, loaded, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "that regraft version 1 learnt from" in page
    assert any(line.startswith("answer length: changed") for line in said)
    bundle = Path(registry.lookup.champion(clones.PARAMS, layout).source)  # type: ignore[union-attr]
    (bundle / "profile.json").write_bytes((bundle / "profile.json").read_bytes() + b" ")
    with pytest.raises(DamagedArtifact, match=r"profile\.json differs from its manifest"):
        write_summary(layout, loaded, tmp_path / "page.html")
