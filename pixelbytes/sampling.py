"""Files from a run's model: images and their texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pixelbytes._files import make_folder, write_text
from pixelbytes.dataset import read_image
from pixelbytes.generate import MAX_SIDE, Prompt, Sample, generate
from pixelbytes.report import save_image
from pixelbytes.runs import Run
from pixelbytes.sources.pixelate import pixelate
from pixelbytes.tokenizer import PixelBytesTokenizer

FORMATS = ("png", "svg", "jpg", "jpeg", "txt")


def generate_files(
    run: Run,
    *,
    checkpoint: str = "best",
    device: str | None = None,
    text: str | None = None,
    image: str | Path | None = None,
    exact: bool = False,
    keep_rows: int | None = None,
    out: str | Path | None = None,
    file_format: str | None = None,
    count: int = 1,
    scale: int = 8,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = None,
    max_tokens: int = 1024,
    free: bool = False,
    say: Callable[[str], Any] = print,
) -> list[tuple[Sample, list[Path]]]:
    """Generate `count` samples, write each as an image and a .txt file of the same name, and say where.

    Args:
        text, image, exact, keep_rows: the prompt (see generate.Prompt); `image` is a file.
        out: the file; its suffix is the format ("txt" writes the text alone). Several get numbers. None: a new name
            in the run folder, in `file_format`.
        scale: width of a pixel in the image file.

    Returns:
        Each sample with the files written for it.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    target = _new_name(run.path, file_format or "png") if out is None else Path(out)
    suffix = target.suffix.lower().removeprefix(".")
    if suffix not in FORMATS or (file_format is not None and suffix != file_format):
        wanted = file_format or ", ".join(FORMATS)
        raise ValueError(f"out: {target} should end in .{wanted}")
    if not target.parent.is_dir():
        make_folder(target.parent)
    sprite = None if image is None else read_sprite(image, run.tokenizer)
    prompt = Prompt(text, sprite, exact, keep_rows)
    model = run.model(checkpoint, device)
    samples = generate(
        model,
        run.tokenizer,
        [prompt] * count,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        context=run.seq_length,
        free=free,
        progress=True,
    )
    written = []
    for number, sample in enumerate(samples, 1):
        path = target if count == 1 else target.with_name(f"{target.stem}-{number:03d}{target.suffix}")
        files = [write_text(path.with_suffix(".txt"), sample.text + "\n")]
        if suffix != "txt":
            if sample.image is None:
                say(f"{path}: not written, the model drew no image")
            else:
                files.insert(0, save_image(sample.image, path, scale))
        size = "no image" if sample.image is None else f"{sample.image.width} x {sample.image.height} pixels"
        say(f"{' + '.join(map(str, files))}: {size}, {sample.text!r}")
        written.append((sample, files))
    return written


def read_sprite(path: str | Path, tokenizer: PixelBytesTokenizer) -> Image.Image:
    """A picture from a file; one too large to be tokens is made a sprite of at most 25 pixels a side."""
    picture = read_image(Path(path))
    if max(picture.size) <= MAX_SIDE:
        return picture
    return Image.fromarray(tokenizer.palette[pixelate(picture, palette=tokenizer.palette, name=str(path))])


def _new_name(folder: Path, suffix: str) -> Path:
    """`folder`/generated-001, or the next number of which there is no file yet."""
    number = 1
    while any(folder.glob(f"generated-{number:03d}*")):
        number += 1
    return folder / f"generated-{number:03d}.{suffix}"
