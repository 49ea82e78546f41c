from .interface import causal_conv1d
from .reference import causal_conv1d_ref

__all__ = ["causal_conv1d", "causal_conv1d_ref"]
