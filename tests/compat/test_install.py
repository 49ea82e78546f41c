"""install and uninstall, what an import costs, and the signatures of everything served."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pixelbytes_kernels import compat

SIGNATURES = json.loads((Path(__file__).parent / "signatures.json").read_text())
SIGNATURES.pop("sources")
ROOTS = ("mamba_ssm", "causal_conv1d")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def resolve(path: str):
    """The attribute that an import statement and a chain of dots reach."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        if name in sys.modules:
            found = importlib.import_module(name)
            for part in parts[cut:]:
                found = getattr(found, part)
            return found
    raise AssertionError(f"nothing of {path} is there")


def signature(function) -> list:
    """As signatures.json writes it."""
    factories = (
        {f.name: f.default_factory() for f in fields(function) if f.default_factory is not MISSING}
        if is_dataclass(function)
        else {}
    )
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in marks:
            found.append(marks[parameter.kind] + name)
        elif name in factories:
            found.append([name, factories[name]])
        else:
            found.append(name if parameter.default is inspect.Parameter.empty else [name, parameter.default])
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(installed, path):
    assert signature(resolve(path)) == SIGNATURES[path]


def test_every_function_served_has_its_signature_in_the_list(installed):
    """A stand-in that is added without its published signature."""
    served = {
        f"{name}.{attribute}"
        for name in sys.modules
        if name.partition(".")[0] in ROOTS and sys.modules[name].__package__ != name
        for attribute, value in vars(sys.modules[name]).items()
        if not attribute.startswith("__") and callable(value)
    }
    assert served == {path for path in SIGNATURES if ".Mamba." not in path}


def test_import_forms(installed):
    import causal_conv1d
    import mamba_ssm
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: F401
    from mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn  # noqa: F401
    from mamba_ssm.modules.mamba_simple import Mamba as same
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    assert Mamba is same
    assert callable(selective_state_update)
    assert isinstance(mamba_ssm.ops.triton.selective_state_update, ModuleType)
    assert callable(causal_conv1d.causal_conv1d_varlen_states)
    for name in ("mamba_ssm", "mamba_ssm.ops", "causal_conv1d"):  # what libraries ask before they import
        assert importlib.util.find_spec(name) is not None


def test_what_is_not_served_says_so_and_can_be_tried(installed):
    with pytest.raises(NotImplementedError, match="Mamba2"):
        from mamba_ssm import Mamba2  # noqa: F401
    with pytest.raises(ImportError):
        from mamba_ssm import MambaLMHeadModel  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="ssd_combined"):
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401


def test_install_twice_and_uninstall():
    compat.install()
    first = sys.modules["mamba_ssm"]
    compat.install()
    assert sys.modules["mamba_ssm"] is first and compat.is_installed()
    compat.uninstall()
    compat.uninstall()
    assert not compat.is_installed()
    assert not [name for name in sys.modules if name.partition(".")[0] in ROOTS]


def test_refuses_when_the_real_package_is_imported(monkeypatch):
    real, its_module = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.modules.mamba2")
    monkeypatch.setitem(sys.modules, "mamba_ssm", real)
    monkeypatch.setitem(sys.modules, "mamba_ssm.modules.mamba2", its_module)
    with pytest.raises(RuntimeError, match="mamba_ssm already imported.*replace=True"):
        compat.install()
    assert sys.modules["mamba_ssm"] is real and "causal_conv1d" not in sys.modules
    compat.install(replace=True)
    assert compat.is_installed() and "mamba_ssm.modules.mamba2" not in sys.modules
    compat.uninstall()
    assert sys.modules["mamba_ssm"] is real and sys.modules["mamba_ssm.modules.mamba2"] is its_module
    assert "mamba_ssm.ops" not in sys.modules


def test_imports_are_light():
    """Neither triton nor what makes an import take seconds; the stand-ins only on demand, and light themselves."""
    code = """
import sys, torch
before = set(sys.modules)
import pixelbytes_kernels
print(*set(sys.modules) - before)
from pixelbytes_kernels import compat
compat.install()
print(*set(sys.modules) - before)
"""
    first, second = (set(line.split()) for line in python(code).splitlines())
    assert "pixelbytes_kernels.ops.selective_scan" in first and "mamba_ssm" in second
    assert not [name for name in first if name.startswith("pixelbytes_kernels.compat")]
    heavy = {"triton", "torch._dynamo", "torch._inductor", "sympy", "transformers", "numpy", "einops", "pixelbytes"}
    assert not {name for name in second for h in heavy if name == h or name.startswith(h + ".")}
