"""The emulator itself: right kernels give right results, and every fault that it is there for is found."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulated import ORDERS, load_emulated

from gpu_checks.emulator.build import CUDA, build_library


@pytest.fixture(scope="module")
def cases():
    load_emulated()  # names what emulator.cpp takes from Python
    path = build_library("emulator_cases", [Path(__file__).with_name("emulator_cases.cu"), CUDA / "launch.cu"])
    library = ctypes.CDLL(str(path))
    for name in ("mirror", "block_sum", "collectives", "reads_at", "writes_at", "reads_packet", "reads_its_own_output", "uninitialised",
                 "half_waits", "lane_missing", "beyond_shared_array", "beyond_dynamic_memory", "much_shared", "large_block",
                 "adds_across_blocks", "half", "bfloat16", "write_back"):  # fmt: skip
        getattr(library, f"case_{name}").restype = ctypes.c_char_p
    library.case_tensor.restype = ctypes.c_void_p
    library.case_tensor.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.case_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_bool]
    return library


def call(cases, name, *arguments, order=ORDERS[0]):
    """The error of a case, or None; tensors (one dimension) among the arguments are handed over as a call of the module would."""
    cases.case_configure(("forward", "reverse", "random").index(order[0]), order[1], order[2])

    def convert(a):
        if isinstance(a, torch.Tensor):
            return ctypes.c_void_p(cases.case_tensor(a.data_ptr(), a.element_size(), a.numel(), a.stride(0)))
        return ctypes.c_int64(a) if type(a) is int else a

    error = getattr(cases, f"case_{name}")(*map(convert, arguments))
    error = error and error.decode()  # before the next call writes another one
    spoilt = cases.case_write_back()
    return error or (spoilt and spoilt.decode())


def each_order(cases, name, make, *arguments):
    """The result of a case that fills `make()`, for each order of threads."""
    results = []
    for order in ORDERS:
        out = make()
        assert call(cases, name, *(out if a is None else a for a in arguments), order=order) is None
        results.append(out)
    return results


def test_barriers_shuffles_and_votes(cases):
    x = torch.randn(4 * 96)
    for out in each_order(cases, "mirror", lambda: torch.empty_like(x), x, None, 4, True):
        assert torch.equal(out, x.view(4, 96).flip(1).flatten())
    sums = each_order(cases, "block_sum", lambda: torch.empty(4), x, None, 4)
    assert all(torch.equal(s, sums[0]) for s in sums)
    torch.testing.assert_close(sums[0], x.view(4, 96).sum(1))
    lane = torch.arange(32)
    wanted = torch.stack([
        torch.where(lane < 3, lane, lane - 3),
        torch.where(lane > 28, lane, lane + 3),
        lane ^ 5,
        lane // 8 * 8 + (lane + 1) % 8,
        torch.where(lane % 8 < 3, lane, lane - 3),
        torch.where(lane % 8 > 4, lane, lane + 3),
        torch.full((32,), 11),
        torch.where(lane < 8, 7 - lane + 1, 0),
    ])  # fmt: skip
    for out in each_order(cases, "collectives", lambda: torch.zeros(256), None):
        assert torch.equal(out.view(8, 32), wanted.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_every_16_bit_number_and_roundings_between_them(cases, dtype):
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    after = (exact.view(torch.int32) + torch.tensor([1, 4095, 4096, 4097, 32767, 32768])[:, None].to(torch.int32)).view(
        torch.float32
    )
    x = torch.cat([exact, after.flatten(), torch.randn(96 * 100)])
    x = torch.cat([x, x.new_zeros(-len(x) % 96)])
    out, back = torch.empty(len(x), dtype=dtype), torch.empty_like(x)
    assert call(cases, "half" if dtype == torch.float16 else "bfloat16", x, out, back, len(x) // 96) is None
    wanted = x.to(dtype)
    same = (out.view(torch.int16) == wanted.view(torch.int16)) | (out.isnan() & wanted.isnan())
    assert same.all(), f"{x[~same][:5]} became {out[~same][:5]}, not {wanted[~same][:5]}"
    assert torch.equal(back.nan_to_num(7), out.float().nan_to_num(7))


def test_a_missing_barrier_shows_as_a_difference(cases):
    x = torch.randn(96)
    results = each_order(cases, "mirror", lambda: torch.empty_like(x), x, None, 1, False)
    assert any(not torch.equal(r, results[0]) for r in results)
    assert any(r.isnan().any() for r in results)  # it read shared memory that nobody had written


def test_blocks_that_meet_in_memory_show_as_a_difference(cases):
    results = each_order(cases, "adds_across_blocks", lambda: torch.zeros(1), None)
    assert any(not torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: "end" if o[2] else "start")
@pytest.mark.parametrize("index", [-1, 10])
def test_accesses_outside_a_tensor(cases, index, order):
    x, out = torch.randn(30)[10:20], torch.empty(1)
    assert "tensor" in call(cases, "reads_at", x, out, index, False, order=order)
    assert "tensor" in call(cases, "writes_at", x, index, order=order)
    assert call(cases, "reads_at", x, out, 9, False, order=order) is None and out == x[9]


# Not through device.h's functions: guard pages stand next to the tensor, on the side that the run asked for.
@pytest.mark.parametrize(("order", "index"), [(ORDERS[0], 16), (ORDERS[1], -1)], ids=["end", "start"])
def test_accesses_past_device_h(cases, order, index):
    x = torch.randn(16)
    assert x.data_ptr() % 16 == 0
    error = call(cases, "reads_at", x, torch.empty(1), index, True, order=order)
    assert error.startswith("CUDA kernel reads_at cannot run: block (0,0,0) thread (0,0,0) touches address")


def test_misaligned_packet(cases):
    x, out = torch.randn(16), torch.empty(1)
    assert call(cases, "reads_packet", x, out, 4) is None and out == x[4]
    assert "not aligned" in call(cases, "reads_packet", x, out, 5)


def test_writing_between_strided_elements(cases):
    x = torch.zeros(8)
    assert call(cases, "writes_at", x[::2], 2) is None
    assert x.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert "between the elements" in call(cases, "writes_at", x[::2], 1)
    assert x.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("reads_its_own_output", "as read-only"),
        ("lane_missing", "lane 5 of warp 0"),
        ("beyond_shared_array", "behind its end"),
    ],
)
def test_faults_with_an_output(cases, name, sentence):
    assert sentence in call(cases, name, torch.zeros(32))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("half_waits", "deadlock"),
        ("beyond_dynamic_memory", "touches address"),
        ("much_shared", "more shared memory than sm_75 has"),
        ("large_block", "invalid block size"),
    ],
)
def test_faults_without_an_output(cases, name, sentence):
    assert sentence in call(cases, name)


def test_shared_memory_starts_as_nan(cases):
    out = torch.zeros(32)
    assert call(cases, "uninitialised", out) is None
    assert out.isnan().all()


def test_an_error_names_kernel_and_sizes(cases):
    error = call(cases, "writes_at", torch.zeros(3), 3)
    assert error == (
        "CUDA kernel writes_at cannot run: block (0,0,0) thread (0,0,0) writes 4 bytes at byte 12 of a tensor of shape (3,) "
        "whose elements span 12 bytes; grid (1, 1, 1), block (1, 1, 1), 0 bytes of shared memory"
    )
