"""Large outputs of the C++ kernels: asked for in huge pages, whole ones inside them only; and written past the caches."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from kernel_forms import needs_cpu

from pixelbytes_kernels import bidirectional_selective_scan, causal_conv1d, pxby_embed, selective_scan
from pixelbytes_kernels.testing import conv_inputs, embed_inputs, scan_inputs

pytestmark = needs_cpu
needs_huge_pages = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="needs Linux with transparent huge pages",
)
HUGE = 2 << 20


def asked_for(begin: int, end: int) -> list[tuple[int, int]]:
    """The parts of [begin, end) whose mapping has the flag that MADV_HUGEPAGE sets."""
    parts = []
    low = high = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
        elif first == "VmFlags:" and "hg" in rest and max(low, begin) < min(high, end):
            parts.append((max(low, begin), min(high, end)))
    return parts


@pytest.fixture
def allocated(monkeypatch):
    """What torch.empty_like and new_empty give: every tensor in a mapping of its own, so that no earlier request is seen."""
    tensors = []

    def in_own_mapping(make):
        def allocate(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.numel() == 0:
                return t
            assert t.is_contiguous()
            room = mmap.mmap(-1, t.nbytes + 4 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            whole = torch.frombuffer(room, dtype=torch.uint8)
            tensors.append(whole[HUGE + 4096 :][: t.nbytes].view(t.dtype).view(t.shape))
            return tensors[-1]

        return allocate

    monkeypatch.setattr(torch, "empty_like", in_own_mapping(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", in_own_mapping(torch.Tensor.new_empty))
    return tensors


def run(f, inputs):
    wanted = [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    out = f(**inputs, backend="cpu")
    torch.autograd.grad(out, wanted, torch.ones(out.shape))


# (1024, 1024) values of fp32 are as large as an output must be: those of the first run below are, those of the second are not, except the
# states of a scan.
@needs_huge_pages
@pytest.mark.parametrize(
    ("f", "inputs", "large"),
    [
        (selective_scan, lambda dim: scan_inputs(1, dim, 1024, 40), 6),  # out, what u, delta and z get, twice states
        (bidirectional_selective_scan, lambda dim: scan_inputs(1, dim, 1024, 40), 6),
        (causal_conv1d, lambda dim: conv_inputs(1, dim, 1024, 4), 2),
        (pxby_embed, lambda dim: embed_inputs(4, 1024, dim=dim // 4), 1),
    ],
    ids=["scan", "bidirectional", "convolution", "embedding"],
)
def test_large_outputs_only(allocated, f, inputs, large):
    run(f, inputs(1024))
    run(f, inputs(1000))
    asked = 0
    for t in allocated:
        begin = t.data_ptr()
        end = begin + t.nbytes
        parts = asked_for(begin - HUGE, end + HUGE)
        if t.nbytes < 2 * HUGE:
            assert parts == []
        else:  # of a scan's states every direction's own, so that a page may be missing in the middle
            assert parts
            assert (parts[0][0], parts[-1][1]) == (-(-begin // HUGE) * HUGE, end // HUGE * HUGE)
            assert sum(high - low for low, high in parts) >= t.nbytes - 3 * HUGE
            asked += 1
    assert asked == large


# From 8 MiB on, rows that are whole cache lines are: a last tile that is not full, a last chunk that is half one, and rows that are not.
@pytest.mark.parametrize("channels_last", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize(("dim", "seqlen"), [(250, 976), (272, 900), (251, 977)])
@pytest.mark.parametrize("f", [selective_scan, bidirectional_selective_scan])
def test_rows_of_a_large_batch_are_those_of_a_small_one(f, dim, seqlen, channels_last):
    inputs = scan_inputs(9, dim, seqlen, 2, channels_last=channels_last)
    assert inputs["u"].nbytes > 8 << 20
    rows = ("u", "delta", "z")

    def found(part):
        cut = {k: v[part] if k in (*rows, "B", "C") else v for k, v in inputs.items()}
        leaves = [cut[name].requires_grad_() for name in rows]
        out = f(**cut, backend="cpu")
        return out.detach(), *torch.autograd.grad(out, leaves, out.detach())

    for whole, first, rest in zip(found(slice(0, 9)), found(slice(0, 4)), found(slice(4, 9)), strict=True):
        assert torch.equal(whole, torch.cat([first, rest]))
        assert not whole.isnan().any()
