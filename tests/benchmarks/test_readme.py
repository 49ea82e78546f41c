"""The committed tables and plots are those of the committed results; the predictions are those of the counts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from benchmarks import model, output, readme, report
from benchmarks.counts import Work
from benchmarks.harness import OURS, Row

ROOT = Path(__file__).parents[2]


def rows() -> list[Row]:
    """A small file of results with a row of each kind that the tables are made of."""
    scan = {"op": "selective_scan", "sizes": "batch=2 seqlen=256 dim=128 dstate=16", "dtype": "float32"}
    both = {**scan, "what": "forward + backward", "unit": "ms"}
    case = "model=SimpleSeqModel batch=32 seqlen=256 stride=32"
    trainer = {"op": "trainer", "sizes": case, "dtype": "float32", "contestant": OURS}
    grown = {"op": "scaling", "what": "forward + backward, growth with seqlen", "dtype": "float32", "unit": "ms"}
    return [
        Row(contestant=OURS, value=2.0, low=1.5, high=2.5, work=Work(1e6, 4e6), backend="cpu", **both),
        Row(contestant="pscan", value=40.0, ratio=20.0, **both),
        Row(contestant="compile", value=1.0, ratio=0.5, **both),
        Row(contestant="reference", value=math.nan, note="refused: out0", **both),
        Row(what="saved for backward", contestant=OURS, value=3e6, unit="bytes", **scan),
        Row(what="iterations per second", value=7.25, unit="it/s", **trainer),
        Row(what="data loading, share of an iteration", value=6.5, unit="%", **trainer),
        Row(what="forward, share of an iteration", value=93.5, unit="%", **trainer),
        *(Row(sizes=f"selective_scan batch=1 seqlen={n}", contestant=OURS, value=n / 9, **grown) for n in (256, 1024)),
    ]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one file of results."""
    shutil.copy(ROOT / "README.md", tmp_path)
    output.write_csv(tmp_path / readme.RESULTS / "cpu.csv", [output.record(row) for row in rows()])
    return tmp_path


def test_what_is_committed_agrees_with_the_results():
    assert readme.stale(ROOT) == [], "run python -m benchmarks.readme"


def test_every_change_of_a_figure_is_noticed_and_mended(checkout):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'pixelbytes[bench]'")
    assert Path("README.md") in readme.write(checkout)
    assert readme.stale(checkout) == []
    text = (checkout / "README.md").read_text()
    assert "| 2 ms (cpu) | 20x | 0.5x | not timed | " in text
    assert "compile takes 0.5 times ours" in text and "7.25" in text and "3 MB" in text
    assert "`trainer`, data loading, share of an iteration" in text and "6.5 %, wanted 5" in text

    path = checkout / readme.RESULTS / "cpu.csv"
    path.write_text(
        path.read_text().replace("forward + backward,batch", "forward + backward,batch").replace(",20.0,", ",21.0,")
    )
    assert set(readme.stale(checkout)) == {Path("README.md"), readme.DOCS, readme.PLOTS / "cpu" / "speed_float32.png"}
    readme.write(checkout)
    assert readme.stale(checkout) == [] and "| 2 ms (cpu) | 21x |" in (checkout / "README.md").read_text()

    (checkout / "README.md").write_text(
        (checkout / "README.md").read_text().replace("| 2 ms (cpu) |", "| 1 ms (cpu) |")
    )
    assert readme.stale(checkout) == [Path("README.md")]
    readme.write(checkout)
    left = checkout / readme.PLOTS / "gone" / "speed_float32.png"
    left.parent.mkdir()
    shutil.copy(checkout / readme.PLOTS / "cpu" / "speed_float32.png", left)
    assert readme.stale(checkout) == [left.relative_to(checkout)]
    assert readme.write(checkout) and not left.exists()


def test_marks_are_wanted():
    with pytest.raises(ValueError, match="begin: speed"):
        readme.replaced("no marks", "speed", "text")


def test_other_tables_in_the_folder_are_passed_over(checkout):
    (checkout / readme.RESULTS / "other.csv").write_text("model,ms\nx,1\n")
    assert list(readme.results(checkout)) == ["cpu"]


def test_report_names_what_was_not_timed(tmp_path):
    records = [output.record(row) for row in rows()]
    text = report.summary(records)
    assert "refused: out0" in text and "| not timed |" in text and "## Goals" in text
    written = report.write(tmp_path, records)
    assert written[0] == tmp_path / "summary.md"
    for name in report.plot_data(records):
        assert (tmp_path / name in written) == (tmp_path / name).exists()


# ---- the model -------------------------------------------------------------------------------------------------------


def prediction(**wanted: str) -> model.Prediction:
    found = [p for p in model.predictions(model.GPUS["t4"], []) if all(getattr(p, k) == v for k, v in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_roofline_by_hand():
    sizes = "batch=32 seqlen=1024 dim=256 dstate=16"
    p = prediction(op="selective_scan", part="forward", backend="cuda", dtype="float32", sizes=sizes)
    steps = 32 * 1024 * 256
    shared = 32 * 1024 * 2 * 16 * 4  # B and C
    assert p.dram == pytest.approx(1e3 * (16 * steps + shared) / 230e9)
    assert p.exps == pytest.approx(1e3 * 16 * steps / (40 * 1.59e9 * 16))
    assert p.issue == pytest.approx(1e3 * 129 * steps / (40 * 1.59e9 * 128))
    assert p.ms == p.dram and p.bound == "DRAM" and p.source == "plan"


def test_counts_of_compiled_kernels_come_first():
    row = dict(
        zip(
            model.COLUMNS,
            ("cuda", "selective_scan", "forward", "float32", "16", "1024", "100000", "20", ""),
            strict=True,
        )
    )
    shorter = {**row, "seqlen": "256", "instructions": "7"}
    other = {**row, "backend": "triton"}
    found = model.plan_for("cuda", "selective_scan", "forward", 2048, "float32", [shorter, row, other])
    assert (found.instructions, found.bytes, found.source) == (100000, 20, "counted")
    assert model.plan_for("cuda", "selective_scan", "forward", 512, "float32", [shorter, row]).instructions == 7
    assert model.plan_for("cuda", "selective_scan", "forward", 128, "float32", [shorter, row]).instructions == 7
    bare = {**row, "instructions": ""}
    partly = model.plan_for("cuda", "selective_scan", "forward", 1024, "float32", [bare])
    assert (partly.instructions, partly.bytes, partly.source) == (129, 20, "bytes counted")
    half = model.plan_for("cuda", "selective_scan", "forward", 128, "float16", [row])
    assert half.bytes == 8 and half.source == "plan"


def test_a_file_of_counts_without_a_column_is_refused(tmp_path):
    (tmp_path / "counts.csv").write_text("backend,op\ncuda,selective_scan\n")
    with pytest.raises(ValueError, match=r"counts\.csv: columns bytes"):
        model.counted(tmp_path / "counts.csv")
    assert model.counted(tmp_path / "absent.csv") == []


def test_measured_column_is_empty_until_somebody_measures():
    assert all(not line.split("|")[-2].strip() for line in model.table(model.GPUS["t4"], {}).splitlines()[2:])
    base = {
        "op": "selective_scan", "what": "forward", "sizes": "batch=32 seqlen=1024 dim=256 dstate=16",
        "dtype": "float32", "device": "cuda", "contestant": OURS, "backend": "cuda", "value": "3.5", "commit": "abc",
    }  # fmt: skip
    here = model.table(model.GPUS["t4"], {"kaggle": [{**base, "machine": "Tesla T4 (sm_75, 15 GiB)"}]})
    assert here.count("| 3.5 |") == 1
    elsewhere = model.table(model.GPUS["t4"], {"h100": [{**base, "machine": "NVIDIA H100 80GB HBM3"}]})
    assert "| 3.5 |" not in elsewhere
    assert "### H100" in model.section({"h100": [{**base, "machine": "NVIDIA H100 80GB HBM3"}]})
    assert "### H100" not in model.section({})
