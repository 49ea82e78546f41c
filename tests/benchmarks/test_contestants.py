"""Who takes part: the field's packages by their own arguments and layouts, and only where they are installed."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

from benchmarks import bench_causal_conv1d, contestants, scans
from benchmarks.harness import OURS, Setup
from pixelbytes_kernels import causal_conv1d_ref, selective_scan_ref
from pixelbytes_kernels.testing import assert_matches, scan_inputs


@pytest.fixture
def installed(monkeypatch):
    """Makes a package "installed" whose module has the functions given."""
    real = importlib.metadata.version
    versions: dict[str, str] = {}

    def install(distribution: str, module: str, **functions: object) -> None:
        versions[distribution] = "9.9"
        made = types.ModuleType(module)
        for name, function in functions.items():
            setattr(made, name, function)
        parts = module.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        monkeypatch.setitem(sys.modules, module, made)
        contestants.peer.cache_clear()

    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    yield install
    contestants.peer.cache_clear()


def test_absent_packages_are_named_with_the_reason():
    here = {name for name in contestants.PEERS if contestants.peer_version(name)}
    assert {line.split(":")[0] for line in contestants.absent()} >= set(contestants.PEERS) - here


def test_a_package_that_does_not_import_is_left_out_with_its_error(installed, monkeypatch):
    installed("causal-conv1d", "causal_conv1d")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)  # import raises
    assert contestants.peer("causal-conv1d")[0] is None
    assert "not importable" in contestants.peer("causal-conv1d")[1]
    assert "causal-conv1d" not in contestants.peer_convolutions()


@pytest.mark.parametrize("both_ways", [False, True])
def test_mamba_ssm_takes_part_with_its_arguments(installed, both_ways):
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        calls.append(u.shape)
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    installed("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    name = "bidirectional_selective_scan" if both_ways else "selective_scan"
    entrants = scans.contestants(Setup(), name)
    assert_matches(entrants["mamba-ssm"], scans.OPS[name][1], scan_inputs(1, 3, 9, 2))
    assert len(calls) == (2 if both_ways else 1)
    assert "mamba-ssm 9.9" in contestants.peer_versions()


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("seqlen", [1, 9, 16])
def test_mamba_py_takes_part(both_ways, seqlen):
    """The package itself, which runs on any machine and is part of the extra `test`: right by the same contract as ours."""
    name = "bidirectional_selective_scan" if both_ways else "selective_scan"
    entrants = scans.contestants(Setup(), name)
    assert_matches(entrants["mambapy"], scans.OPS[name][1], scan_inputs(2, 3, seqlen, 4))
    assert "mambapy " in contestants.peer_versions()


def test_convolutions_take_part_with_their_layouts(installed):
    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        return causal_conv1d_ref(x, weight, bias, activation)

    def rows_first(x, weight=None, bias=None, activation=None):
        return causal_conv1d_ref(x.transpose(1, 2), weight, bias, activation).transpose(1, 2), None

    installed("causal-conv1d", "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    installed("fla-core", "fla.modules.causal_conv1d", causal_conv1d=rows_first)
    entrants = bench_causal_conv1d.contestants(Setup())
    inputs = bench_causal_conv1d.conv_inputs(Setup(), 1, 9, 3, channels_last=True)
    for name in ("causal-conv1d", "flash-linear-attention", "F.conv1d", OURS, "torch"):
        assert_matches(entrants[name], entrants["reference"], inputs)


def test_who_is_left_out_takes_no_part():
    setup = Setup(without=("torch", "compile", "pscan", "mambapy"))
    chosen = scans.chosen(setup, "selective_scan", scans.sizes_of(1, 8, 4))
    assert chosen == [OURS, "reference"]
    assert "torch" not in bench_causal_conv1d.contestants(setup)


def test_every_backend_usable_here_takes_part():
    found = scans.contestants(Setup(), "selective_scan")
    assert {OURS, "torch", "reference", "pscan", "compile"} <= set(found)
    assert "cuda" not in found and "triton" not in found  # tensors of a CPU
    x = torch.zeros(1, 3, 4)
    assert found[OURS](x, x, torch.zeros(3, 2), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)).shape == x.shape
