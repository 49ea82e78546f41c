"""What is measured of `selective_scan` and `bidirectional_selective_scan` alike.

Time against the formulations of plain.py; the share of the multiply-add pipe that the arithmetic of the recurrence
fills; sizes that are not multiples of a vector; bytes kept for the backward; peak memory; growth with seqlen.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from benchmarks import plain
from benchmarks.harness import (
    BOTH,
    OURS,
    Goal,
    Row,
    Run,
    Setup,
    alternate,
    peak_bytes,
    refusal,
    saved_bytes,
    spread,
    time_rows,
    timed_pass,
    value_rows,
    words,
)
from pixelbytes_kernels import (
    available_backends,
    bidirectional_selective_scan,
    bidirectional_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from pixelbytes_kernels.testing import Inputs, scan_inputs

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "selective_scan": (selective_scan, selective_scan_ref),
    "bidirectional_selective_scan": (bidirectional_selective_scan, bidirectional_selective_scan_ref),
}
DSTATE = 16
GATE_UPDATES = 1 << 24  # state updates (batch x seqlen x dim x dstate) up to which the float64 oracle takes seconds

# batch, seqlen, dim: goals against the parallel scan and against torch.compile
CASES: dict[tuple[int, int, int], dict[str, Goal]] = {
    (2, 256, 128): {"pscan": Goal(15, 25), "compile": Goal(6, 10)},
    (32, 256, 128): {"pscan": Goal(40, 75), "compile": Goal(15, 35)},
    (8, 1024, 512): {"pscan": Goal(50, 90), "compile": Goal(15, 35)},
}

# Multiply, add and multiply-add instructions on vectors that one state update (one step of one state of one channel)
# needs, by instruction set; counted in csrc/cpu/scan_steps.h and exp2_product<kSafe = true> of csrc/cpu/simd.h. Not
# counted: loads, stores, permutations, min/max, integer operations, scalef; and everything that is per step and channel
# instead of per state (softplus, gate, skip), which is the overhead that the share shows.
#
#   exp2, AVX-512 (v4)   t = ab + magic, tn = t - magic, r = ab - tn            fma, sub, fms
#                        q = r (c1 + r c2), table + table q                     fma, mul, fma           6
#   exp2, AVX2 (v3)      y = ab, t = y + magic, tn = t - magic, r = y - tn      mul, add, sub, sub
#                        q = r (c1 + r (c2 + r c3)), s + s q                    fma, fma, mul, fma      8
#   forward              h = decay h + (B x)                                    mul, fma
#                        y += C h                                               fma                     3
#   backward, recompute  as the forward: exp2 + 3; y for the gradient of z
#   backward, sweep      dh += C dy, dC += dy h, dB += x dh, dx += B dh         4 fma
#                        dh *= decay, g = dh h, ddelta += A g, dA += delta g    2 mul, 2 fma            8
_EXP2 = {"v4": 6, "v3": 8}
FORWARD_INSTRUCTIONS = {isa: exp2 + 3 for isa, exp2 in _EXP2.items()}
BACKWARD_INSTRUCTIONS = {isa: exp2 + 3 + 8 for isa, exp2 in _EXP2.items()}
PIPE_GOALS = {"forward": Goal(50, 75, of="value"), "backward": Goal(45, 65, of="value")}


@functools.cache
def compiled() -> plain.Scan:
    """One for both ops: their chunks are the same."""
    return plain.compiled_states()


def contestants(name: str) -> dict[str, Callable[..., Tensor]]:
    op, reference = OPS[name]
    both_ways = name.startswith("bidirectional")
    return {
        OURS: op,
        "torch path": functools.partial(op, backend="torch"),
        "reference": reference,
        "pscan": plain.scan_op(plain.parallel_states, both_ways),
        "compile": plain.scan_op(lambda *rows: compiled()(*rows), both_ways),
    }


def leaves(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The inputs with gradients switched on, and those tensors."""
    wanted = [v.requires_grad_() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return inputs, wanted


def workload(name: str, contestant: str, sizes: Mapping[str, int]) -> Run:
    inputs, wanted = leaves(scan_case(sizes))
    return timed_pass(functools.partial(contestants(name)[contestant], **inputs), wanted)


def sizes_of(batch: int, seqlen: int, dim: int, dstate: int = DSTATE) -> dict[str, int]:
    return {"batch": batch, "seqlen": seqlen, "dim": dim, "dstate": dstate}


def scan_case(sizes: Mapping[str, int]) -> Inputs:
    return scan_inputs(sizes["batch"], sizes["dim"], sizes["seqlen"], sizes["dstate"])


def updates(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.values())


def gate(name: str, chosen: list[str], sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """Those of `chosen` that may not be timed, and why. Long rows are cut: the oracle's time grows, the kernels' paths
    stay.
    """
    fits = max(2 * plain.LONGEST_CHUNK, limit * sizes["seqlen"] // updates(sizes))
    inputs = scan_case({**sizes, "seqlen": min(sizes["seqlen"], fits)})
    found = {c: refusal(contestants(name)[c], OPS[name][1], inputs) for c in chosen if c != "reference"}
    return {c: why for c, why in found.items() if why}


def rows(setup: Setup, name: str) -> Iterator[Row]:
    yield from speed(setup, name)
    yield from pipe_share(setup, name)
    yield from unaligned(setup, name)
    yield from memory(setup, name)
    if not setup.quick:
        yield from scaling(setup, name)


def speed(setup: Setup, name: str) -> Iterator[Row]:
    for case, goals in CASES.items():
        sizes = sizes_of(*case)
        large = updates(sizes) > GATE_UPDATES
        chosen = [OURS, "pscan"]
        if not setup.quick:  # torch.compile takes a minute or two for each size
            chosen += ["compile"] + ([] if large else ["torch path", "reference"])
        setup.report(f"{name} {words(sizes)}: checking {', '.join(chosen)}")
        refused = gate(name, chosen, sizes, GATE_UPDATES >> (4 if setup.quick else 0))
        inputs, wanted = leaves(scan_case(sizes))
        calls = {c: functools.partial(contestants(name)[c], **inputs) for c in chosen if c not in refused}
        setup.report(f"{name} {words(sizes)}: timing")
        measured = alternate(
            {c: timed_pass(call, wanted) for c, call in calls.items()}, setup.budget, setup.least, setup.most
        )
        # Unavoidable: u, delta, z and dout read, out, du, ddelta and dz written, u, delta and z read once more.
        traffic = 4.0 * 11 * updates(sizes) / sizes["dstate"]
        yield from time_rows(setup, name, words(sizes), measured, refused, goals, traffic=traffic)


def pipe_share(setup: Setup, name: str) -> Iterator[Row]:
    """Between two measurements of the machine's multiply-add rate, since a shared machine is never twice as fast as
    before.
    """
    if not available_backends()["cpu"][0] or setup.threads != 1:
        return
    _cpu = importlib.import_module("pixelbytes_kernels._cpu")

    if _cpu.isa not in _EXP2:
        return
    needed = {"forward": FORWARD_INSTRUCTIONS[_cpu.isa], "backward": BACKWARD_INSTRUCTIONS[_cpu.isa]}
    directions = 2 if name.startswith("bidirectional") else 1
    for case in CASES:
        sizes = sizes_of(*case)
        setup.report(f"{name} {words(sizes)}: share of the multiply-add pipe")
        run = workload(name, OURS, sizes)
        run()
        samples: dict[str, list[float]] = {part: [] for part in needed}
        before = _cpu.fma_rate(0.2)
        rates = [before]
        for _ in range(3 if setup.quick else 7):
            taken = [run() for _ in range(1 + int(2**25 // updates(sizes)))]
            after = _cpu.fma_rate(0.2)
            for part, instructions in needed.items():
                seconds = statistics.median(t[part] for t in taken)
                samples[part].append(
                    100 * instructions * updates(sizes) * directions / seconds / ((before + after) / 2)
                )
            before = after
            rates.append(after)
        for part, shares in samples.items():
            s = spread(shares)
            roof = statistics.median(rates) / 1e9
            note = (
                f"{words(sizes)}, {part}: {needed[part]} instructions a state update ({_cpu.isa}), roof {roof:.1f} G/s"
            )
            what = f"share of the multiply-add pipe, {part}"
            yield Row(
                name, what, words(sizes), "float32", OURS, s.median, "%", s.low, s.high, goal=PIPE_GOALS[part],
                gflops=2 * roof * s.median / 100, note=note,
            )  # fmt: skip


def unaligned(setup: Setup, name: str) -> Iterator[Row]:
    """dim 81 is the inner 162 of the paper's model, no multiple of any vector; its d_state is 64."""
    cases = {dim: sizes_of(4, 256, dim, 64) for dim in (162, 160)}
    refused = gate(name, [OURS], cases[162], GATE_UPDATES >> 2).get(OURS)
    goal = Goal(1.4, at_least=False, of="value")
    what = "dim 162 over dim 160, per state update"
    if refused:
        yield Row(name, what, words(cases[162]), "float32", OURS, math.nan, "x", goal=goal, note=refused)
        return
    setup.report(f"{name} {words(cases[162])}: against dim 160")
    runs = {str(dim): workload(name, OURS, sizes) for dim, sizes in cases.items()}
    measured = alternate(runs, setup.budget, setup.least, setup.most)
    each = {dim: measured[str(dim)][BOTH].median / updates(sizes) for dim, sizes in cases.items()}
    note = ", ".join(f"dim {dim}: {1e12 * t:.0f} ps" for dim, t in each.items())
    yield Row(name, what, words(cases[162]), "float32", OURS, each[162] / each[160], "x", goal=goal, note=note)


def memory(setup: Setup, name: str) -> Iterator[Row]:
    both_ways = name.startswith("bidirectional")
    what, unit = "saved for backward, inputs included", "elements of batch x seqlen x dim"
    for case in list(CASES)[: 2 if setup.quick else 3]:
        sizes = sizes_of(*case)
        inputs, _ = leaves(scan_case(sizes))
        setup.report(f"{name} {words(sizes)}: bytes saved")
        element = 4 * updates(sizes) / sizes["dstate"]
        kept = {
            c: saved_bytes(functools.partial(contestants(name)[c], **inputs)) / element
            for c in (OURS, "torch path", "pscan")
        }
        goals = {OURS: Goal(7.2, 6.3, at_least=False, of="value")} if both_ways else {}
        yield from value_rows(setup, name, what, words(sizes), kept, unit, goals)
    for case in list(CASES)[1 : 2 if setup.quick else 3]:
        sizes = sizes_of(*case)
        setup.report(f"{name} {words(sizes)}: peak memory")
        peaks = {c: peak_bytes(name, c, sizes) for c in (OURS, "pscan")}
        goals = {"pscan": Goal(10, 18)}
        yield from value_rows(setup, name, "peak resident memory above start", words(sizes), peaks, "bytes", goals)


def slope(x: list[float], y: list[float]) -> float:
    """Exponent p of y ~ x^p by least squares of the logarithms."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def scaling(setup: Setup, name: str) -> Iterator[Row]:
    """Ours alone, one size at a time growing."""
    series = {
        "seqlen": [sizes_of(2, n, 128) for n in (256, 1024, 4096, 16384)],
        "batch": [sizes_of(n, 256, 128) for n in (1, 4, 16, 64)],
        "dim": [sizes_of(2, 256, n) for n in (64, 256, 1024)],
        "dstate": [sizes_of(2, 256, 128, n) for n in (4, 16, 64, 256)],
    }
    for varied, cases in series.items():
        times: list[float] = []
        for sizes in cases:
            setup.report(f"{name} {words(sizes)}: growth with {varied}")
            measured = alternate({OURS: workload(name, OURS, sizes)}, setup.budget / 4, setup.least, setup.most)
            s = measured[OURS][BOTH]
            times.append(s.median)
            what = f"{BOTH}, growth with {varied}"
            yield Row(
                name,
                what,
                words(sizes),
                "float32",
                OURS,
                s.median * 1e3,
                "ms",
                s.low * 1e3,
                s.high * 1e3,
                threads=setup.threads,
            )
            inputs, _ = leaves(scan_case(sizes))
            kept = saved_bytes(functools.partial(contestants(name)[OURS], **inputs))
            yield Row(
                name,
                f"saved, growth with {varied}",
                words(sizes),
                "float32",
                OURS,
                kept,
                "bytes",
                threads=setup.threads,
            )
        exponent = slope([float(sizes[varied]) for sizes in cases], times)
        yield Row(
            name,
            f"exponent of time against {varied}",
            "1 is linear",
            "float32",
            OURS,
            exponent,
            "power",
            threads=setup.threads,
        )
