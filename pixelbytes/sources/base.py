"""What a source is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

__all__ = ["Item", "Source"]


@dataclass(frozen=True)
class Item:
    """One picture with its caption; `name` is a valid file stem."""

    name: str
    image: Image.Image
    caption: str


class Source(Protocol):
    """Lists keys and gives the item of each."""

    def keys(self) -> list[str]:
        """All items, in a fixed order."""
        ...

    def item(self, key: str) -> Item:
        """One item; ValueError naming the file when it is broken."""
        ...

    def card(self) -> dict[str, Any]:
        """`source`, `title`, `licence` and what else belongs on the data card."""
        ...
