"""What `pixelbytes build` reads, and the common path from there to a data folder or a packed set."""

from __future__ import annotations

from .base import Item, Source
from .build import SOURCES, BuildReport, build

__all__ = ["SOURCES", "BuildReport", "Item", "Source", "build"]
