"""The command: parts of ops, files that grow, an op that fails, pytest's face."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import bench_capacity, bench_scaling, bench_trainer, output, scans
from benchmarks.harness import OURS, Setup

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take no time."""
    monkeypatch.setattr(scans, "CASES", {"cpu": [(1, 24, 16)] * 3})
    monkeypatch.setattr(
        bench_scaling, "scan_series", lambda setup: {"seqlen": [scans.sizes_of(1, n, 8) for n in (8, 64)]}
    )
    monkeypatch.setattr(bench_trainer, "MODELS", {"SimpleSeqModel": bench_trainer.MODELS["SimpleSeqModel"]})
    monkeypatch.setattr(bench_trainer, "BATCH", 2)
    monkeypatch.setattr(bench_capacity, "SEQLEN", 16)
    monkeypatch.setattr(bench_capacity, "DEPTH", 1)


def test_every_op_has_parts():
    for op in command.OPS:
        parts = importlib.import_module(f"benchmarks.bench_{op}").PARTS
        assert parts and all(callable(call) for call in parts.values())


def test_what_there_is_not_is_one_line_and_two(capsys):
    for wrong, said in (("nothing", "no op 'nothing'"), ("selective_scan/nothing", "no part 'nothing'")):
        with pytest.raises(SystemExit) as stopped:
            command.parse(["cpu", "--op", wrong])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.parse(["cpu", "--merge"])


def test_parts_are_merged_into_one_file(tiny, tmp_path, capsys):
    path, folder = tmp_path / "cpu.csv", tmp_path / "report"
    short = ["cpu", "--quick", "--seconds", "0.1", "--csv", str(path), "--merge"]
    assert command.main([*short, "--op", "selective_scan/speed"]) == 0
    first = output.read_csv(path)
    assert {r["what"] for r in first if r["op"] == "selective_scan"} == {"forward", "backward", "forward + backward"}
    assert {r["value"] for r in first if r["op"] == "numerics"} == {"1.0"}
    assert command.main([*short, "--op", "scaling/scans", "capacity", "trainer", "--out", str(folder)]) == 0
    both = output.read_csv(path)
    assert [r for r in both if r["op"] in ("selective_scan", "numerics")] == first
    assert {r["op"] for r in both} == {"selective_scan", "numerics", "scaling", "capacity", "trainer"}
    assert "exponent of time" in {r["what"] for r in both}
    windows = {
        r["contestant"]: float(r["value"]) for r in both if r["what"] == "largest batch" and "dim=64 " in r["sizes"]
    }
    assert windows[OURS] > windows["reference"] > 0
    of_trainer = [r for r in both if r["op"] == "trainer"]
    assert {r["what"].split(",")[0] for r in of_trainer if r["unit"] == "%"} == set(bench_trainer.SHARES)
    assert any(r["contestant"] == OURS and float(r["value"]) > 0 for r in of_trainer if r["unit"] == "it/s")
    assert (folder / "summary.md").read_text().startswith("# PixelBytes kernels")
    assert "goals" in capsys.readouterr().out


def test_parts_of_an_iteration_add_up_to_it(tiny, tmp_path):
    profile = bench_trainer.Profile(bench_trainer.make_trainer(Setup(), "SimpleSeqModel", str(tmp_path)), "cpu")
    start = time.perf_counter()
    profile.watch(3)
    whole = time.perf_counter() - start
    seconds = profile.seconds
    assert {part: len(taken) for part, taken in seconds.items()} == dict.fromkeys(bench_trainer.SHARES, 4)
    assert all(s >= 0 for taken in seconds.values() for s in taken)
    assert 0 < sum(map(sum, seconds.values())) <= whole  # what is left over made the loader
    assert min(sum(seconds[part]) for part in ("data loading", "forward", "backward", "optimiser")) > 0


def test_an_op_that_fails_is_a_row_and_the_next_one_goes_on(tiny, tmp_path, monkeypatch, capsys):
    def fails(setup: Setup, name: str):
        yield from ()
        raise RuntimeError("out of order")

    monkeypatch.setattr(scans, "speed", fails)
    from benchmarks import bench_selective_scan

    monkeypatch.setattr(bench_selective_scan, "PARTS", {"speed": lambda setup: fails(setup, "selective_scan")})
    path = tmp_path / "cpu.csv"
    ops = ["selective_scan", "scaling/scans"]
    assert command.main(["cpu", "--quick", "--seconds", "0.1", "--csv", str(path), "--op", *ops]) == 0
    found = output.read_csv(path)
    assert any("out of order" in r["note"] for r in found) and any(r["op"] == "scaling" for r in found)


def test_pytest_face():
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install 'pixelbytes[bench]'")
    chosen = "test_decode_step and cpu or (test_op and cpu and pxby_embed and ours)"
    arguments = ["-q", "-p", "no:cacheprovider", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
