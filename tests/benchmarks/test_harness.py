"""The benchmarks measure what they say: statistics, the gate, the byte counter, the contestants, the files, the
command.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_bysmamba, bench_mamba_step, bench_scaling, goals, machine, output, plain, scans
from benchmarks.counts import Work
from benchmarks.harness import (
    OURS,
    Goal,
    Row,
    Setup,
    alternate,
    measure,
    peak_bytes,
    refusal,
    refusal_of,
    saved_bytes,
    spread,
)
from pixelbytes_kernels import (
    available_backends,
    bidirectional_selective_scan_ref,
    causal_conv1d_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels.testing import assert_matches, scan_inputs

ROOT = Path(__file__).parents[2]


def test_spread_is_median_and_quantiles():
    s = spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (s.median, s.low, s.high) == (3.5, 2.0, 5.0)
    one = spread([7.0])
    assert (one.median, one.low, one.high) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_goals():
    ratio = Goal(15, 25)
    assert [ratio.verdict(x) for x in (14.9, 15, 25)] == ["missed", "met", "aim met"]
    bytes_ = Goal(7.2, 6.3, at_least=False)
    assert [bytes_.verdict(x) for x in (7.3, 7.2, 6.3)] == ["missed", "met", "aim met"]
    assert ratio.verdict(math.nan) == bytes_.verdict(math.nan) == "missed"
    assert Goal(1.4, at_least=False).verdict(0.1) == "met"


def test_alternation_gives_every_contestant_the_same_rounds():
    order: list[str] = []

    def contestant(name: str, seconds: float):
        def run() -> dict[str, float]:
            order.append(name)
            return {"all": seconds}

        return run

    measured = alternate({"a": contestant("a", 1.0), "b": contestant("b", 3.0)}, budget=0.0, least=4, most=4)
    assert measured["a"]["all"].median == 1.0 and measured["b"]["all"].median == 3.0
    rounds = order[4:]  # two warming runs each
    assert rounds.count("a") == rounds.count("b") == 20
    assert rounds[:10] == ["a"] * 5 + ["b"] * 5 and rounds[10:20] == ["b"] * 5 + ["a"] * 5


def test_bytes_are_counted_once_a_storage_and_exactly():
    x = torch.randn(10, 20, requires_grad=True)
    w = torch.randn(20, 30, requires_grad=True)
    assert saved_bytes(lambda: x @ w) == 4 * (200 + 600)
    assert saved_bytes(lambda: x @ w, [w]) == 4 * 200
    assert (
        saved_bytes(lambda: (x.exp() * x.exp()[:5].repeat(2, 1)).sum()) == 4 * 200 * 3
    )  # two exps and the repeated half
    assert saved_bytes(lambda: x[:2] * x[2:4]) == 4 * 200  # two views of one storage
    assert saved_bytes(lambda: x.detach() @ w.detach()) == 0


def test_gate_lets_the_right_pass_and_refuses_the_wrong():
    inputs = scan_inputs(1, 3, 9, 2)
    assert refusal(selective_scan, selective_scan_ref, inputs) == ""

    def slightly_off(*args, **kwargs):
        return selective_scan_ref(*args, **kwargs) * (1 + 1e-5)

    def wrong_gradient(u, *args, **kwargs):
        return selective_scan_ref(u + 1e-3 * (u - u.detach()), *args, **kwargs)

    def not_a_number(*args, **kwargs):
        return selective_scan_ref(*args, **kwargs) * math.nan

    for wrong in (slightly_off, wrong_gradient, not_a_number):
        assert refusal(wrong, selective_scan_ref, inputs).startswith("refused: ")
    assert "du" in refusal(wrong_gradient, selective_scan_ref, inputs)


def test_gate_of_whole_results():
    oracle = {"a": torch.ones(3, dtype=torch.float64)}
    plain_result = {"a": torch.full((3,), 1.00001)}
    assert refusal_of({"a": torch.full((3,), 1.000015)}, plain_result, oracle) == ""
    assert refusal_of({"a": torch.full((3,), 1.00003)}, plain_result, oracle).startswith("refused: a")
    assert refusal_of({"a": torch.full((3,), math.nan)}, plain_result, oracle).startswith("refused: a")


def test_what_is_refused_is_not_timed(monkeypatch):
    def wrong(u, delta, A, B, C, *rest, **options):
        return u * A.sum() * B.sum() * C.sum() + delta

    both = {OURS: wrong, "pscan": wrong}
    monkeypatch.setattr(scans, "contestants", lambda setup, name: both)
    sizes = scans.sizes_of(1, 8, 3, 2)
    assert set(scans.gate(Setup(), "selective_scan", [OURS, "pscan"], sizes, 1 << 10)) == {OURS, "pscan"}


@pytest.mark.parametrize("name", scans.OPS)
@pytest.mark.parametrize("part", ["pipe", "unaligned", "padding"])
def test_parts_of_the_scans(monkeypatch, part, name):
    """A quick run of each gives rows with plausible numbers; none of the pipe where its instructions are not counted."""
    monkeypatch.setitem(scans.CASES, "cpu", [(2, 256, 128)])
    rows = list(scans.PARTS[part](Setup(quick=True, seconds=0.0, least=1, most=1), name))
    if part == "pipe":
        counted = available_backends()["cpu"][1].split()[-1] in scans.FORWARD_INSTRUCTIONS
        expected = {"forward", "backward"} if counted else set()
        assert {row.what.split(", ")[1] for row in rows} == expected
        assert all(0 < row.value < 100 for row in rows)
    else:
        (row,) = rows
        assert 0.01 < row.value < 100, row.note


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_part_of_the_scans(monkeypatch):
    """Bytes kept at both sizes, peak memory at the second one; the plain formulation keeps all states and takes more of each."""
    monkeypatch.setitem(scans.CASES, "cpu", [(1, 33, 16), (4, 256, 64)])
    rows = list(scans.memory(Setup(quick=True), "bidirectional_selective_scan"))
    found = {(row.what.split(" ")[0], row.sizes.split(" ")[0], row.contestant): row.value for row in rows}
    for of in (("saved", "batch=1"), ("saved", "batch=4"), ("peak", "batch=4")):
        assert 2 * found[(*of, OURS)] < found[(*of, "pscan")] < math.inf, found
    inputs_alone = 3 + 2 * scans.DSTATE / 64  # u, delta, z; B and C
    assert inputs_alone < found["saved", "batch=4", OURS] < 7.2


def test_what_fails_at_full_size_is_a_row_with_the_reason():
    def fails() -> dict[str, float]:
        raise MemoryError("not enough")

    runs = {OURS: lambda: {"forward": 1.0}, "big": fails}
    rows = list(measure(Setup(least=1, most=1), "op", "n=1", runs, {"wrong": "refused: out0"}, of="forward"))
    assert [row.contestant for row in rows] == [OURS, "wrong", "big"]
    assert rows[0].value == 1000 and math.isnan(rows[2].value) and "MemoryError: not enough" in rows[2].note
    assert rows[1].note == "refused: out0"


@pytest.mark.parametrize("seqlen", [1, 2, 3, 16, 17, 37])
@pytest.mark.parametrize("states", [plain.parallel_states, plain.chunked_states], ids=["parallel", "chunked"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_plain_scans_are_the_reference(seqlen, states, both_ways):
    reference = bidirectional_selective_scan_ref if both_ways else selective_scan_ref
    assert_matches(plain.scan_op(states, both_ways), reference, scan_inputs(2, 6, seqlen, 5))
    bare = scan_inputs(1, 3, seqlen, 2, D=False, z=False, delta_bias=False, delta_softplus=False)
    assert_matches(plain.scan_op(states, both_ways), reference, bare)


@pytest.mark.parametrize("reverse", [False, True])
def test_sweep_is_a_prefix(reverse):
    decay, x = torch.rand(2, 3, 8, 4, dtype=torch.float64), torch.randn(2, 3, 8, 4, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    state = torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(7, -1, -1) if reverse else range(8):
        state = decay[:, :, t] * state + x[:, :, t]
        wanted[:, :, t] = state
    found = x.clone()
    plain.sweep(decay.clone(), found, reverse)
    torch.testing.assert_close(found, wanted)


def test_plain_convolution_is_the_reference():
    inputs = {"x": torch.randn(2, 5, 9), "weight": torch.randn(5, 4), "bias": torch.randn(5)}

    def reference(**kwargs):
        return causal_conv1d_ref(**kwargs, activation="silu")

    assert_matches(plain.conv_silu, reference, inputs)


def test_plain_model_is_the_model():
    assert bench_bysmamba.gate(Setup(), dim=16, depth=1, seqlen=11) == {}


def test_plain_decoding_is_the_layers_in_turn():
    case = {"layers": 2, "d_model": 16, "batch": 2}
    x = bench_mamba_step.token(16, 2)
    layers = bench_mamba_step.make_layers(case, torch.float64)
    oracle = bench_mamba_step.checked(lambda token: plain.decode_step(token, layers), x.double())
    eager = bench_mamba_step.checked(bench_mamba_step.decoder("reference", case), x)
    assert refusal_of(bench_mamba_step.checked(bench_mamba_step.decoder(OURS, case), x), eager, oracle) == ""
    assert layers[0].state.abs().sum() > 0


def test_slope():
    assert bench_scaling.slope([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == pytest.approx(1.0)
    assert bench_scaling.slope([1.0, 2.0, 4.0], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_peak_sees_the_states_that_the_parallel_scan_keeps():
    sizes = {"batch": 8, "seqlen": 256, "dim": 128, "dstate": 16}
    found = peak_bytes(Setup(), "selective_scan", "pscan", sizes, dict)
    states = 4 * math.prod(sizes.values())
    assert found is not None and 3 * states < found < 20 * states


def rows_of_each_kind() -> list[Row]:
    sizes = "batch=2 seqlen=256 dim=128 dstate=16"
    about = {"op": "selective_scan", "what": "forward + backward", "sizes": sizes, "dtype": "float32", "unit": "ms"}
    work = Work(bytes=1e6, flops=4e6)
    return [
        Row(contestant=OURS, value=2.0, low=1.5, high=2.5, work=work, backend="cpu", **about),
        Row(contestant="pscan", value=40.0, low=38.0, high=42.0, ratio=20.0, **about),
        Row(contestant="compile", value=math.nan, note="refused: out0", **about),
        Row(contestant="elsewhere", value=3.0, machine="a machine far away", **about),
    ]


def test_table_and_files(tmp_path):
    rows = rows_of_each_kind()
    text = output.table(rows)
    assert "2 [1.5, 2.5]" in text and "20x (40)  (15 / 25: met)" in text and "ms of ours (cpu)" in text
    assert "compile: refused" in text and "MISSED" in text
    assert output.summary(rows) == "goals: 0 aims met, 1 met, 1 missed"
    assert "MISSED" in output.goals_table(rows)
    records = [output.record(row) for row in rows]
    output.write_csv(tmp_path / "a" / "cpu.csv", records)
    output.write_json(tmp_path / "cpu.json", records)
    read = output.read_csv(tmp_path / "a" / "cpu.csv")
    assert [row["verdict"] for row in read] == ["", "met", "missed", ""]
    assert read[1]["ratio"] == "20.0" and read[0]["machine"] and read[0]["torch"] == torch.__version__
    assert float(read[0]["GB_per_s"]) == pytest.approx(0.5) and float(read[0]["GFLOP_per_s"]) == pytest.approx(2)
    shares = float(read[0]["percent_of_copy"]), float(read[0]["percent_of_peak"])
    wanted = 100 * 0.5 / float(read[0]["copy_GB_per_s"]), 100 * 2 / float(read[0]["peak_GFLOP_per_s"])
    assert shares == pytest.approx(wanted, rel=1e-4)
    assert read[2]["value"] == ""
    assert read[3]["machine"] == "a machine far away" and read[3]["torch"] == read[3]["commit"] == ""
    assert json.loads((tmp_path / "cpu.json").read_text())[1]["contestant"] == "pscan"


def test_merging_replaces_what_was_measured_again(tmp_path):
    old = [output.record(row) for row in rows_of_each_kind()]
    other = {**old[0], "op": "causal_conv1d"}
    again = {**old[1], "value": 50.0}
    found = output.merged([*old, other], [again])
    assert [(r["op"], r["contestant"], r["value"]) for r in found] == [
        ("selective_scan", "ours", 2.0),
        ("selective_scan", "compile", None),
        ("selective_scan", "elsewhere", 3.0),
        ("selective_scan", "pscan", 50.0),
        ("causal_conv1d", "ours", 2.0),
    ]
    (tmp_path / "not.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a file of results"):
        output.read_csv(tmp_path / "not.csv")


def test_goals_are_for_one_thread_of_a_cpu_in_float32():
    row = rows_of_each_kind()[1]
    assert goals.verdict(row) == "met"
    for change in ({"dtype": "float16"}, {"device": "cuda"}, {"threads": 2}, {"op": "pxby_embed"}):
        assert goals.verdict(Row(**{**vars(row), **change})) == ""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cpu.csv"
    path.write_text("old")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError):
            output.write_csv(path, [output.record(row) for row in rows_of_each_kind()])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["cpu.csv"]


def test_environment_names_the_machine():
    assert set(machine.environment()) >= {"machine", "torch", "commit", "backends", "peers", "date"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_one_line_and_two():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "cuda"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("benchmarks: error: the GPU cannot be measured")
