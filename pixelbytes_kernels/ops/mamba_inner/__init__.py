from .interface import mamba_inner
from .reference import mamba_inner_ref

__all__ = ["mamba_inner", "mamba_inner_ref"]
