"""Packed rows give what each row gives alone, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from pixelbytes_kernels import (
    causal_conv1d,
    mamba_inner,
    pack,
    selective_scan,
    seq_idx_from_cu_seqlens,
    seq_idx_from_position_ids,
    unpack,
)
from pixelbytes_kernels.compat.mamba_simple import Mamba
from pixelbytes_kernels.testing import error

LENGTHS = (5, 1, 9, 0, 70)  # one step, none, and more than a chunk of the scan
BOUND = 64 * torch.finfo(torch.float32).eps


def rows(width=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=gen) for length in LENGTHS]


def test_pack_and_unpack():
    packed, cu_seqlens = pack(rows())
    assert (
        packed.shape == (1, 85, 8) and cu_seqlens.tolist() == [0, 5, 6, 15, 15, 85] and cu_seqlens.dtype == torch.int32
    )
    for row, back in zip(rows(), unpack(packed, cu_seqlens), strict=True):
        assert torch.equal(row, back)


def test_seq_idx():
    _, cu_seqlens = pack(rows())
    wanted = [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    found = seq_idx_from_cu_seqlens(cu_seqlens)
    assert found.dtype == torch.int32 and found.tolist() == [wanted]
    padded = seq_idx_from_cu_seqlens(cu_seqlens, total=88)
    assert padded.tolist() == [wanted + [5] * 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_seq_idx_from_position_ids(dtype):
    """Rows that restart at 0, that start later, and a sequence that ends where the next would have gone on."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [7, 8, 3, 4, 4, 5]], dtype=dtype)
    assert seq_idx_from_position_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]]
    assert seq_idx_from_position_ids(torch.tensor([[255, 0]], dtype=torch.uint8)).tolist() == [[0, 1]]


def test_seq_idx_forms_agree():
    _, cu_seqlens = pack(rows())
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    a, b = seq_idx_from_cu_seqlens(cu_seqlens), seq_idx_from_position_ids(positions)
    assert torch.equal(a[:, 1:] != a[:, :-1], b[:, 1:] != b[:, :-1])  # where they change is what counts


def test_scan_and_convolution_row_by_row():
    packed, cu_seqlens = pack(rows(width=8 * 4))
    seq_idx = seq_idx_from_cu_seqlens(cu_seqlens)
    A = -torch.rand(8, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))

    def run(row, seq_idx=None):  # (batch, length, 32)
        u, delta, z, rest = row.transpose(1, 2).split(8, dim=1)
        u = causal_conv1d(u, weight, activation="silu", seq_idx=seq_idx)
        return selective_scan(
            u, delta, A, rest[:, :4], rest[:, 4:], z=z, delta_softplus=True, seq_idx=seq_idx
        ).transpose(1, 2)

    found = unpack(run(packed, seq_idx), cu_seqlens)
    for row, out in zip(rows(width=32), found, strict=True):
        if len(row):
            assert error(out, run(row[None])[0]) <= BOUND


def test_mixer_row_by_row_with_gradients():
    torch.manual_seed(0)
    m = Mamba(8)
    weights = list(m.parameters())

    def run(packed, seq_idx=None):
        mixer = (m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight, m.out_proj.bias)
        xz, options = m.in_proj(packed).transpose(1, 2), {"D": m.D, "delta_bias": m.dt_proj.bias, "seq_idx": seq_idx}
        return mamba_inner(xz, *mixer, -torch.exp(m.A_log), **options)

    packed, cu_seqlens = pack(rows())
    found = run(packed, seq_idx_from_cu_seqlens(cu_seqlens))
    dout = torch.randn_like(found)
    outs = [run(row[None]) for row in rows() if len(row)]
    assert error(found.detach(), torch.cat(outs, dim=1).detach()) <= BOUND
    grads = torch.autograd.grad(found, weights, dout)
    alone = torch.autograd.grad(torch.cat(outs, dim=1), weights, dout)
    for grad, wanted in zip(grads, alone, strict=True):
        assert error(grad, wanted) <= 4 * BOUND  # sums over 85 steps in another order


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        (lambda: pack([]), ValueError, "rows"),
        (lambda: pack([torch.zeros(2, 3), torch.zeros(2, 4)]), ValueError, "row 1"),
        (lambda: unpack(torch.zeros(1, 4, 2), torch.tensor([0, 3])), ValueError, r"\(1, 3, ...\)"),
        (lambda: seq_idx_from_cu_seqlens(torch.tensor([0.0, 3.0])), TypeError, "cu_seqlens"),
        (lambda: seq_idx_from_cu_seqlens(torch.tensor([[0, 3]])), ValueError, "shape"),
        (lambda: seq_idx_from_cu_seqlens(torch.tensor([1, 3])), ValueError, "start with 0"),
        (lambda: seq_idx_from_cu_seqlens(torch.tensor([0, 3, 2])), ValueError, "never fall"),
        (lambda: seq_idx_from_cu_seqlens(torch.tensor([0, 3]), total=2), ValueError, "total"),
        (lambda: seq_idx_from_position_ids(torch.tensor([0, 1])), ValueError, "shape"),
        (lambda: seq_idx_from_position_ids(torch.tensor([[0.0, 1.0]])), TypeError, "position_ids"),
    ],
)
def test_errors_name_the_argument(call, kind, word):
    with pytest.raises(kind, match=word):
        call()
