from .interface import MambaLayer, MambaStep

__all__ = ["MambaLayer", "MambaStep"]
