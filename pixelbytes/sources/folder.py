"""Source `folder`: the user's own pictures, NAME.png (or .jpg, .webp, .gif, .bmp) with NAME.txt beside each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..dataset import list_images, read_caption, read_image
from .base import Item

__all__ = ["Folder"]


class Folder:
    """Pictures of one folder, by name; of an animated file the first frame."""

    def __init__(self, path: str | Path, licence: str = "unknown"):
        self.path = Path(path)
        self._files = {file.stem: file for file in list_images(self.path)}
        self._licence = licence

    def keys(self) -> list[str]:
        """Names without suffix, in order."""
        return list(self._files)

    def item(self, key: str) -> Item:
        """The picture and caption of one name; ValueError naming the file when either is missing or broken."""
        file = self._files[key]
        return Item(key, read_image(file), read_caption(file))

    def card(self) -> dict[str, Any]:
        """Source and licence for the data card. The path stays out of it: a data set may be published."""
        return {"source": "folder", "title": self.path.resolve().name, "licence": self._licence}
