"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` beside `path`, then rename it over `path`; on failure the old file stays as it was.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full. The message names the file.
    """
    path = Path(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # After a rename there is nothing left to remove; after a failure, or Ctrl-C, there is.
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` for UTF-8 text."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """`write_text` for JSON, indented and in UTF-8."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or damaged one is an error that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def make_folder(path: str | Path) -> Path:
    """Create a folder with its parents; an error names it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create the folder {path}: {error.strerror or error}") from error
    return path


def _umask() -> int:
    # mkstemp makes files readable by their owner only; a model that is to be shared follows the user's umask.
    mask = os.umask(0)
    os.umask(mask)
    return mask
