from .interface import pxby_embed
from .reference import pxby_embed_ref

__all__ = ["pxby_embed", "pxby_embed_ref"]
