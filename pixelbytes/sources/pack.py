"""A whole data set in one file: a .npz that numpy reads, written so that equal data give equal bytes.

Members: `palette` (P, 3) uint8; `shapes` (N, 2) uint8, height and width; `pixels` (sum of H*W,) uint8, palette indices
in raster order; `names`, `captions`, UTF-8 text with one item a line; `meta`, a JSON object in UTF-8 (source, licence,
attribution, versions). Texts are stored as uint8 arrays.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import write_bytes
from ..palette import check_palette

__all__ = ["EMBEDDED", "Pack", "read_pack", "write_pack"]

EMBEDDED = Path(__file__).parent.parent / "data" / "openmoji25.npz"


@dataclass(frozen=True)
class Pack:
    """palette (P, 3) uint8; grids: (H, W) uint8 palette indices; names and captions, one an item; meta."""

    palette: NDArray[np.uint8]
    grids: list[NDArray[np.uint8]]
    names: list[str]
    captions: list[str]
    meta: dict[str, Any]


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def write_pack(path: str | Path, pack: Pack) -> Path:
    """Write `pack` to `path`, whole or not at all."""
    for name, lines in (("names", pack.names), ("captions", pack.captions)):
        if len(lines) != len(pack.grids) or any(len(line.splitlines()) != 1 for line in lines):
            raise ValueError(f"{name} must be {len(pack.grids)} single lines of text")
    members = {
        "palette": check_palette(pack.palette),
        "shapes": np.array([grid.shape for grid in pack.grids], dtype=np.uint8).reshape(-1, 2),
        "pixels": np.concatenate([grid.ravel() for grid in pack.grids]).astype(np.uint8),
        "names": _bytes("\n".join(pack.names)),
        "captions": _bytes("\n".join(pack.captions)),
        "meta": _bytes(json.dumps(pack.meta, ensure_ascii=False, indent=1, sort_keys=True)),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in members.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
            # numpy.savez stamps the present time; a fixed one keeps the file the same from build to build.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(info, buffer.getvalue(), compresslevel=9)
    return write_bytes(path, file.getvalue())


def read_pack(path: str | Path) -> Pack:
    """Read what `write_pack` wrote; ValueError naming the file when it is damaged or something else."""
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = {
                name: np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
                for name in ("palette", "shapes", "pixels", "names", "captions", "meta")
            }
        shapes = member["shapes"].astype(np.int64)  # (N, 2)
        stops = np.cumsum(shapes.prod(axis=1))
        names = member["names"].tobytes().decode().split("\n")
        captions = member["captions"].tobytes().decode().split("\n")
        meta = json.loads(member["meta"].tobytes())
        palette, pixels = check_palette(member["palette"]), member["pixels"]
        if not len(names) == len(captions) == len(shapes) or len(pixels) != stops[-1] or pixels.max() >= len(palette):
            raise ValueError("its members do not fit together")
    # What zipfile, zlib and numpy raise for damaged files and for files of another kind.
    except (EOFError, LookupError, TypeError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a packed PixelBytes data set: {error}") from error
    grids = [pixels[stop - h * w : stop].reshape(h, w) for (h, w), stop in zip(shapes.tolist(), stops, strict=True)]
    return Pack(palette, grids, names, captions, meta)
