"""What is measured of `selective_scan` and `bidirectional_selective_scan` alike.

Time against the formulations of plain.py and the field's packages; the share of the multiply-add pipe that the
arithmetic of the recurrence fills; sizes that are not multiples of a vector; rows padded with zeros; bytes kept for the
backward; peak memory.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from benchmarks import counts, plain
from benchmarks.contestants import auto, backends, peer_scans
from benchmarks.harness import (
    BOTH,
    OURS,
    PEAK_OF,
    Row,
    Run,
    Setup,
    alternate,
    measure,
    peak_bytes,
    refusal,
    saved_bytes,
    spread,
    timed_pass,
    value_rows,
    why_not,
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
SLOW_UPDATES = 1 << 22  # up to which loops in PyTorch do, on a CPU

# batch, seqlen, dim; those of a GPU fill it, but for the first
CASES = {
    "cpu": [(2, 256, 128), (32, 256, 128), (8, 1024, 512)],
    "cuda": [(2, 256, 128), (32, 256, 128), (8, 1024, 512), (32, 1024, 256)],
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
#   backward, sweep      dh += C dy, dC = dy h, dB = x dh, dx += B dh           2 mul, 2 fma
#                        dh *= decay, g = dh h, ddelta += A g, dA += delta g    2 mul, 2 fma            8
#                        (and not counted: 2 adds and 4 permutations that sum dB and dC over the lanes)
_EXP2 = {"v4": 6, "v3": 8}
FORWARD_INSTRUCTIONS = {isa: exp2 + 3 for isa, exp2 in _EXP2.items()}
BACKWARD_INSTRUCTIONS = {isa: exp2 + 3 + 8 for isa, exp2 in _EXP2.items()}


@functools.cache
def compiled() -> plain.Scan:
    """One for both ops: their chunks are the same."""
    return plain.compiled_states()


def contestants(setup: Setup, name: str) -> dict[str, Callable[..., Tensor]]:
    op, reference = OPS[name]
    both_ways = name.startswith("bidirectional")
    return {
        **backends(setup, name, op),
        "reference": reference,
        "pscan": plain.scan_op(plain.parallel_states, both_ways),
        "compile": plain.scan_op(lambda *rows: compiled()(*rows), both_ways),
        **peer_scans(both_ways),
    }


def chosen(setup: Setup, name: str, sizes: Mapping[str, int]) -> list[str]:
    """torch.compile takes minutes, and the slow ones a minute at large sizes: not in a quick run."""
    slow = ["torch", "reference"] if updates(sizes) > SLOW_UPDATES and not setup.on_gpu else []
    left_out = {"compile", "torch", "reference"} if setup.quick else set(slow)
    return [c for c in contestants(setup, name) if c not in left_out and c not in setup.without]


def leaves(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The inputs with gradients switched on, and those tensors."""
    wanted = [v.requires_grad_() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return inputs, wanted


def workload(setup: Setup, name: str, contestant: str, sizes: Mapping[str, int]) -> Run:
    inputs, wanted = leaves(scan_case(setup, sizes))
    return timed_pass(setup, functools.partial(contestants(setup, name)[contestant], **inputs), wanted)


def sizes_of(batch: int, seqlen: int, dim: int, dstate: int = DSTATE) -> dict[str, int]:
    return {"batch": batch, "seqlen": seqlen, "dim": dim, "dstate": dstate}


def scan_case(setup: Setup, sizes: Mapping[str, int]) -> Inputs:
    inputs = scan_inputs(sizes["batch"], sizes["dim"], sizes["seqlen"], sizes["dstate"], dtype=setup.dtype)
    return setup.place(inputs)


def updates(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.values())


def gate(setup: Setup, name: str, names: list[str], sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """Those of `names` that may not be timed, and why. Long rows are cut: the oracle's time grows, the kernels' paths
    stay.
    """
    fits = max(2 * plain.LONGEST_CHUNK, limit * sizes["seqlen"] // updates(sizes))
    inputs = scan_case(setup, {**sizes, "seqlen": min(sizes["seqlen"], fits)})
    entrants = contestants(setup, name)
    found = {c: refusal(entrants[c], OPS[name][1], inputs) for c in names if c != "reference"}
    return {c: why for c, why in found.items() if why}


def gate_limit(setup: Setup) -> int:
    return GATE_UPDATES >> (4 if setup.quick and not setup.on_gpu else 0)


def speed(setup: Setup, name: str) -> Iterator[Row]:
    for case in CASES[setup.kind]:
        sizes = sizes_of(*case)
        names = chosen(setup, name, sizes)
        setup.report(f"{name} {words(sizes)} {setup.dtype_name}: checking {', '.join(names)}")
        refused = gate(setup, name, names, sizes, gate_limit(setup))
        runs: dict[str, Run] = {}
        inputs, wanted = leaves(scan_case(setup, sizes))
        for c in names:
            if c not in refused:
                runs[c] = timed_pass(setup, functools.partial(contestants(setup, name)[c], **inputs), wanted)
        setup.report(f"{name} {words(sizes)} {setup.dtype_name}: timing")
        work = counts.scan(sizes, setup.itemsize, name.startswith("bidirectional"))
        yield from measure(setup, name, words(sizes), runs, refused, work=work, backend=auto(setup, name))


def pipe_share(setup: Setup, name: str) -> Iterator[Row]:
    """Between two measurements of the machine's multiply-add rate, since a shared machine is never twice as fast as
    before.
    """
    if setup.on_gpu or not available_backends()["cpu"][0] or setup.threads != 1:
        return
    _cpu = importlib.import_module("pixelbytes_kernels._cpu")

    if _cpu.isa not in _EXP2:
        return
    needed = {"forward": FORWARD_INSTRUCTIONS[_cpu.isa], "backward": BACKWARD_INSTRUCTIONS[_cpu.isa]}
    directions = 2 if name.startswith("bidirectional") else 1
    for case in CASES["cpu"]:
        sizes = sizes_of(*case)
        setup.report(f"{name} {words(sizes)}: share of the multiply-add pipe")
        run = workload(setup, name, OURS, sizes)
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
        roof = statistics.median(rates) / 1e9
        for part, shares in samples.items():
            s = spread(shares)
            note = (
                f"{words(sizes)}, {part}: {needed[part]} instructions a state update ({_cpu.isa}), roof {roof:.1f} G/s"
            )
            what = f"share of the multiply-add pipe, {part}"
            yield setup.row(name, what, words(sizes), OURS, s.median, "%", low=s.low, high=s.high, note=note)


def quotient(setup: Setup, name: str, c: str, what: str, cases: Mapping[str, tuple[Mapping[str, int], Inputs]]) -> Row:
    """Time of a state update in the first of two cases (sizes and inputs by name) over that in the second."""
    of = next(iter(cases.values()))[0]
    setup.report(f"{name} {words(of)}: {what}")
    refused = gate(setup, name, [c], of, gate_limit(setup) >> 2).get(c)
    try:
        runs: dict[str, Run] = {}
        for case, (_, inputs) in cases.items():
            runs[case] = timed_pass(setup, functools.partial(contestants(setup, name)[c], **inputs), leaves(inputs)[1])
        measured = alternate(runs, setup.budget, setup.least, setup.most) if not refused else {}
    except Exception as failed:
        refused = why_not(failed)
    if refused:
        return setup.row(name, what, words(of), c, math.nan, "x", note=refused)
    each = {case: measured[case][BOTH].median / updates(sizes) for case, (sizes, _) in cases.items()}
    note = ", ".join(f"{case}: {1e12 * t:.3g} ps" for case, t in each.items())
    first, second = each.values()
    return setup.row(name, what, words(of), c, first / second, "x", note=note)


def unaligned(setup: Setup, name: str) -> Iterator[Row]:
    """dim 81 is the inner 162 of the paper's model, no multiple of any vector; its d_state is 64."""
    all_sizes = [sizes_of(32 if setup.on_gpu else 4, 256, dim, 64) for dim in (162, 160)]
    cases = {f"dim {sizes['dim']}": (sizes, scan_case(setup, sizes)) for sizes in all_sizes}
    yield quotient(setup, name, OURS, "dim 162 over dim 160, per state update", cases)


def padding(setup: Setup, name: str) -> Iterator[Row]:
    """Behind the end of a zero-padded row states fade into denormal numbers, which many processors are slow at."""
    sizes = sizes_of(4, 2048, 128)
    cases = {case: (sizes, scan_case(setup, sizes)) for case in ("padded", "full")}
    cases["padded"][1]["u"][..., sizes["seqlen"] // 8 :] = 0
    for c in (OURS,) if setup.quick else (OURS, "pscan"):
        yield quotient(setup, name, c, "zeros behind an eighth of u, over full rows", cases)


def memory(setup: Setup, name: str) -> Iterator[Row]:
    what, unit = "saved for backward, inputs included", "elements of batch x seqlen x dim"
    plain_too = [c for c in ("torch", "pscan", "mambapy") if c in contestants(setup, name)]
    for case in CASES["cpu"][: 2 if setup.quick else 3]:
        sizes = sizes_of(*case)
        inputs, _ = leaves(scan_case(setup, sizes))
        setup.report(f"{name} {words(sizes)}: bytes saved")
        element = setup.itemsize * updates(sizes) / sizes["dstate"]
        kept: dict[str, float] = {}
        for c in (OURS, *plain_too):
            kept[c] = saved_bytes(functools.partial(contestants(setup, name)[c], **inputs)) / element
        yield from value_rows(setup, name, what, words(sizes), kept, unit)
    for case in CASES["cpu"][1 : 2 if setup.quick else 3]:
        sizes = sizes_of(*case)
        setup.report(f"{name} {words(sizes)}: peak memory")
        peaks = {
            c: peak_bytes(setup, name, c, sizes, functools.partial(workload, setup, name, c, sizes))
            for c in (OURS, *plain_too)
            if c != "torch"
        }
        yield from value_rows(setup, name, PEAK_OF[setup.kind], words(sizes), peaks, "bytes")


PARTS = {"speed": speed, "pipe": pipe_share, "unaligned": unaligned, "padding": padding, "memory": memory}
