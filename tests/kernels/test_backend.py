"""Which implementation runs: the pure choice, what a user sets, the reasons given, one warning about a slow choice."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch

import pixelbytes_kernels as pk
from pixelbytes_kernels import _backend
from pixelbytes_kernels._backend import BACKENDS, available_backends, choose_backend
from pixelbytes_kernels.testing import scan_inputs

ALL = {name: (True, "") for name in BACKENDS}
BARE = {**ALL, "cpu": (False, "not built"), "cuda": (False, "no CUDA device"), "triton": (False, "no GPU")}


@pytest.mark.parametrize(
    ("device", "usable", "implemented", "chosen"),
    [
        ("cpu", ALL, BACKENDS, "cpu"),
        ("cuda", ALL, BACKENDS, "cuda"),
        ("cuda", {**ALL, "cuda": (False, "")}, BACKENDS, "triton"),
        ("cuda", ALL, ("reference", "torch", "triton"), "triton"),
        ("xpu", ALL, BACKENDS, "triton"),
        ("cpu", BARE, BACKENDS, "torch"),
        ("cuda", BARE, BACKENDS, "torch"),
        ("mps", ALL, BACKENDS, "torch"),
        ("cpu", BARE, ("reference", "cpu"), "reference"),
    ],
)
def test_automatic_choice(device, usable, implemented, chosen):
    assert choose_backend("auto", device, usable, implemented, "op") == chosen


def test_float64_on_a_gpu():
    assert choose_backend("auto", "cuda", ALL, BACKENDS, "op", torch.float64) == "torch"
    assert choose_backend("auto", "cpu", ALL, BACKENDS, "op", torch.float64) == "cpu"
    for name, device in (("cuda", "cuda"), ("triton", "xpu")):
        with pytest.raises(RuntimeError, match=f"op: backend '{name}' has no float64; use backend='torch'"):
            choose_backend(name, device, ALL, BACKENDS, "op", torch.float64)


@pytest.mark.parametrize("asked", ["auto", "cuda", "triton"])
def test_bfloat16_on_a_gpu_that_lacks_it(asked):
    with pytest.raises(RuntimeError, match="op: this GPU has no bfloat16, .* use float16"):
        choose_backend(asked, "cuda", ALL, BACKENDS, "op", torch.bfloat16, bfloat16=False)
    assert choose_backend("torch", "cuda", ALL, BACKENDS, "op", torch.bfloat16, bfloat16=False) == "torch"
    assert choose_backend("auto", "cuda", ALL, BACKENDS, "op", torch.float16, bfloat16=False) == "cuda"


def test_the_interpreter_runs_on_the_cpu_when_it_is_named():
    usable = {**ALL, "triton": (True, _backend.INTERPRETER)}
    assert choose_backend("triton", "cpu", usable, BACKENDS, "op") == "triton"
    assert choose_backend("auto", "cpu", usable, BACKENDS, "op") == "cpu"
    assert choose_backend("auto", "cpu", {**BARE, "triton": usable["triton"]}, BACKENDS, "op") == "torch"
    with pytest.raises(RuntimeError, match="cannot run on tensors on 'cuda'"):
        choose_backend("triton", "cuda", usable, BACKENDS, "op")


def test_interpreter_is_found_by_its_variable(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends.__wrapped__()["triton"] == (True, "Triton interpreter, slow: for tests")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_is_taken(name):
    device = {"cuda": "cuda", "triton": "xpu"}.get(name, "cpu")
    assert choose_backend(name, device, ALL, BACKENDS, "op") == name


@pytest.mark.parametrize(
    ("asked", "device", "implemented", "error", "message"),
    [
        ("quick", "cpu", BACKENDS, ValueError, r"op: backend must be one of \('auto', .*, got 'quick'"),
        ("cpu", "cpu", BACKENDS, RuntimeError, "op: backend 'cpu' cannot run: not built"),
        ("cuda", "cuda", BACKENDS, RuntimeError, "op: backend 'cuda' cannot run: no CUDA device"),
        ("triton", "cpu", ("torch",), RuntimeError, "op: backend 'triton' has no kernel for this operation"),
    ],
)
def test_a_named_backend_that_cannot_run(asked, device, implemented, error, message):
    with pytest.raises(error, match=message):
        choose_backend(asked, device, BARE, implemented, "op")


@pytest.mark.parametrize(("asked", "device"), [("cpu", "cuda"), ("cuda", "cpu"), ("triton", "cpu")])
def test_a_backend_for_another_device(asked, device):
    with pytest.raises(RuntimeError, match=f"op: backend '{asked}' cannot run on tensors on '{device}'"):
        choose_backend(asked, device, ALL, BACKENDS, "op")


def test_available_backends_have_reasons():
    found = pk.available_backends()
    assert tuple(found) == BACKENDS
    assert found["reference"][0]
    assert found["torch"][0]
    assert all(isinstance(usable, bool) and reason for usable, reason in found.values())


def test_use_backend_is_what_auto_means_and_is_restored(monkeypatch):
    seen = []
    choose = _backend.choose_backend
    monkeypatch.setattr(_backend, "choose_backend", lambda *a: seen.append(choose(*a)) or seen[-1])
    inputs = scan_inputs()
    with pk.use_backend("reference"):
        with pk.use_backend("torch"):
            pk.selective_scan(**inputs)
        pk.selective_scan(**inputs)
        pk.selective_scan(**inputs, backend="torch")  # a named backend is not overruled
    assert seen == ["torch", "reference", "torch"]
    with pytest.raises(ZeroDivisionError), pk.use_backend("torch"):
        raise ZeroDivisionError
    assert _backend._asked == "auto"


def test_set_backend_refuses_what_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        pk.set_backend("quick")
    monkeypatch.setattr(_backend, "available_backends", lambda: BARE)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: no CUDA device"):
        pk.set_backend("cuda")
    assert _backend._asked == "auto"


@pytest.fixture
def without_cpu(monkeypatch):
    """As where `_cpu` was not built."""
    monkeypatch.setattr(_backend, "available_backends", lambda: BARE)
    monkeypatch.setattr(_backend, "_constant_backends", lambda: BARE)
    _backend._warn_slow.cache_clear()
    yield
    _backend._warn_slow.cache_clear()


def test_one_warning_about_a_slow_choice(without_cpu):
    inputs = scan_inputs()
    with pytest.warns(RuntimeWarning, match="slow backend 'torch' .* 'cpu' cannot be used: not built"):
        pk.selective_scan(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.selective_scan(**inputs)
        pk.bidirectional_selective_scan(**inputs)


def test_no_warning_about_a_slow_backend_that_was_asked_for(without_cpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.selective_scan(**scan_inputs(), backend="torch")
        with pk.use_backend("reference"):
            pk.selective_scan(**scan_inputs())


def test_an_extension_that_does_not_load_keeps_its_reason(monkeypatch):
    def broken(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_backend.importlib, "import_module", broken)
    module, reason = _backend.load_extension.__wrapped__("_cpu")
    assert module is None
    assert reason == "the extension _cpu does not load: libgomp.so.1: cannot open shared object file"


def test_an_unknown_instruction_set_is_a_reason_not_a_crash():
    if not pk.available_backends()["cpu"][0]:
        pytest.skip(pk.available_backends()["cpu"][1])
    code = "import pixelbytes_kernels as pk; print(pk.available_backends()['cpu'])"
    env = {**os.environ, "PIXELBYTES_CPU_ISA": "v9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "False" in done.stdout
    assert "PIXELBYTES_CPU_ISA=v9: this build or processor has no such instruction set" in done.stdout


def test_the_kernel_package_does_not_import_the_model_package():
    code = "import sys, pixelbytes_kernels; print([m for m in sys.modules if m.split('.')[0] == 'pixelbytes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_op_takes_its_references_arguments():
    """One signature everywhere: the reference's, and `backend`."""
    import inspect

    for name in (n for n in pk.__all__ if f"{n}_ref" in pk.__all__):
        public = inspect.signature(getattr(pk, name)).parameters
        reference = inspect.signature(getattr(pk, f"{name}_ref")).parameters
        assert [n for n in public if n != "backend"] == list(reference), name
        assert public["backend"].default == "auto", name
