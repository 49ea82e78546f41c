from .interface import bimamba_inner
from .reference import bimamba_inner_ref

__all__ = ["bimamba_inner", "bimamba_inner_ref"]
