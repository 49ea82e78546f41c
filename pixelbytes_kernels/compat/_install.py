"""Puts the stand-ins into `sys.modules` under the real packages' names, and takes them out again."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from types import ModuleType

from ._not_served import NotServed

# Stand-in -> names it takes over from modules of this package. Without any it is only a package of others.
_MAMBA = ("Mamba",)
_SCAN = ("selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref")
_VIM = ("bimamba_inner_fn", "bimamba_inner_ref", "mamba_inner_fn_no_out_proj")
_STATE = ("selective_state_update", "selective_state_update_ref")
_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_VARLEN = ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref")
STAND_INS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "mamba_ssm": (("selective_scan_interface", ("selective_scan_fn", "mamba_inner_fn")), ("mamba_simple", _MAMBA)),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba_simple": (("mamba_simple", _MAMBA),),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (("selective_scan_interface", (*_SCAN, *_VIM)),),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.selective_state_update": (("selective_state_update", _STATE),),
    "mamba_ssm.utils": (),
    "mamba_ssm.utils.generation": (("generation", ("InferenceParams",)),),
    "causal_conv1d": (("causal_conv1d_interface", _CONV), ("causal_conv1d_varlen", _VARLEN[:1])),
    "causal_conv1d.causal_conv1d_interface": (
        ("causal_conv1d_interface", (*_CONV, "causal_conv1d_ref", "causal_conv1d_update_ref")),
    ),
    "causal_conv1d.causal_conv1d_varlen": (("causal_conv1d_varlen", _VARLEN),),
}
# Below mamba_ssm 2, so that code which asks for Mamba-2 by version does not look for it here.
VERSIONS = {"mamba_ssm": "1.2.2+pixelbytes", "causal_conv1d": "1.5.0+pixelbytes"}
_NOT_SERVED = ("Mamba2", "Mamba3", "MambaLMHeadModel")
_replaced: dict[str, ModuleType] = {}


def is_installed() -> bool:
    """Whether the stand-ins are in place."""
    return all(_is_ours(sys.modules.get(root)) for root in VERSIONS)


def install(*, replace: bool = False) -> None:
    """Makes `import mamba_ssm` and `import causal_conv1d` give this package's stand-ins. Twice is the same as once.

    Call it before the code that imports them. Real packages that are installed but not yet imported are hidden.

    Args:
        replace: also where a real package is already imported; code that took functions from it keeps those.

    Raises:
        RuntimeError: a real package is already imported and `replace` is False; nothing has changed then.
    """
    real = [root for root in VERSIONS if root in sys.modules and not _is_ours(sys.modules[root])]
    if real and not replace:
        raise RuntimeError(
            f"compat.install: {' and '.join(real)} already imported; call install() before, or "
            "install(replace=True) to put the stand-ins in its place for later imports"
        )
    if is_installed():
        return
    made = {name: _stand_in(name, sources) for name, sources in STAND_INS.items()}
    for name in [name for name in sys.modules if name.partition(".")[0] in VERSIONS]:
        module = sys.modules.pop(name)
        if not _is_ours(module):
            _replaced[name] = module
    sys.modules.update(made)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        # selective_state_update is a module and a function in it; only the package above the module gets the module.
        if parent and not hasattr(made[parent], child):
            setattr(made[parent], child, module)


def uninstall() -> None:
    """Takes the stand-ins out, and puts back what `install(replace=True)` had replaced. Nothing to do: no error."""
    for name in STAND_INS:
        if _is_ours(sys.modules.get(name)):
            del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()


def _is_ours(module: ModuleType | None) -> bool:
    return getattr(module, "__pixelbytes_stand_in__", False) is True


def _stand_in(name: str, sources: tuple[tuple[str, tuple[str, ...]], ...]) -> ModuleType:
    module = ModuleType(name, f"Stand-in for {name} by pixelbytes_kernels.compat.")
    is_package = name in VERSIONS or not sources
    # find_spec of a loaded module returns its __spec__, and fails where that is None.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    module.__file__ = __file__  # tools that list modules take one without a file for a namespace package
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []
    for source, names in sources:
        found = importlib.import_module(f".{source}", __package__)
        for attribute in names:
            setattr(module, attribute, getattr(found, attribute))
    if name in VERSIONS:
        module.__dict__["__version__"] = VERSIONS[name]
    if name == "mamba_ssm":
        module.__dict__["__getattr__"] = _refuse
    module.__dict__["__pixelbytes_stand_in__"] = True
    return module


def _refuse(name: str) -> object:
    if name in _NOT_SERVED:
        raise NotServed(f"mamba_ssm.{name} is not served by pixelbytes_kernels.compat, which has Mamba-1 only")
    raise AttributeError(f"module 'mamba_ssm' has no attribute {name!r}")
