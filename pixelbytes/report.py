"""Pictures of a run, drawn with Pillow alone: curves, and sheets of samples."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pixelbytes._files import write_bytes

INK, FAINT, PAPER = "#2b2b33", "#dddde3", "#ffffff"
COLOURS = ("#2f6fd0", "#d9542b", "#2a9d5c", "#8a4fbf")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG aside, then rename it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return write_bytes(path, buffer.getvalue())


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (860, 520),
) -> Image.Image:
    """Lines through points (x, y), one a name, with axes and a legend."""
    series = {name: points for name, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        raise ValueError("series: there is not one point to draw")
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    margin = 0.06 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin
    scale = 2  # drawn twice as large, then shrunk: smooth lines
    width, height = size[0] * scale, size[1] * scale
    left, top, right, bottom = 80 * scale, 50 * scale, width - 30 * scale, height - 65 * scale
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    small, large = _font(13 * scale), _font(17 * scale)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    for value in ticks(y_low, y_high):
        _, y = at(x_low, value)
        draw.line([(left, y), (right, y)], fill=FAINT, width=scale)
        draw.text((left - 10 * scale, y), f"{value:.4g}", font=small, fill=INK, anchor="rm")
    for value in ticks(x_low, x_high, 8):
        x, _ = at(value, y_low)
        draw.line([(x, bottom), (x, bottom + 5 * scale)], fill=INK, width=scale)
        draw.text((x, bottom + 9 * scale), f"{value:.4g}", font=small, fill=INK, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=scale)
    draw.text((left, 16 * scale), title, font=large, fill=INK, anchor="lt")
    draw.text(((left + right) / 2, height - 12 * scale), x_label, font=small, fill=INK, anchor="mb")
    label = Image.new("L", (bottom - top, 20 * scale), 0)
    ImageDraw.Draw(label).text((label.width / 2, label.height / 2), y_label, font=small, fill=255, anchor="mm")
    label = label.rotate(90, expand=True)
    image.paste(INK, (8 * scale, top), label)
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = [at(x, y) for x, y in points]
        if len(line) > 1:
            draw.line(line, fill=colour, width=2 * scale, joint="curve")
        if len(line) <= 40:
            for x, y in line:
                draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=colour)
        y = top + (8 + 22 * index) * scale
        draw.line([(right - 175 * scale, y), (right - 150 * scale, y)], fill=colour, width=3 * scale)
        draw.text((right - 142 * scale, y), name, font=small, fill=INK, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def loss_curve(history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Loss") -> Path:
    """Loss over epochs of `Trainer.history`, as PNG."""
    names = {"train_loss": "training", "val_loss": "validation", "test_loss": "test"}
    series = {
        name: [(row["epoch"], row[key]) for row in history if row.get(key) is not None] for key, name in names.items()
    }
    return save_png(chart(series, title=title, x_label="epoch", y_label="loss (nats per target)"), path)


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Each pixel as a square of `scale` pixels."""
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def sheet(samples: Sequence[tuple[Image.Image | None, str]], columns: int = 4, cell: int = 180) -> Image.Image:
    """Sprites in a grid, each enlarged to fit its cell, its text below."""
    font = _font(13)
    line_height, lines = 17, 4
    rows = max(1, math.ceil(len(samples) / columns))
    pad = 14
    height = cell + lines * line_height + 2 * pad
    page = Image.new("RGB", (columns * (cell + pad) + pad, rows * height + pad), "#f4f4f7")
    draw = ImageDraw.Draw(page)
    for index, (image, text) in enumerate(samples):
        x, y = pad + index % columns * (cell + pad), pad + index // columns * height
        draw.rectangle([x, y, x + cell - 1, y + cell - 1], fill=PAPER, outline=FAINT)
        if image is not None:
            large = enlarge(image, max(1, (cell - 10) // max(image.size)))
            page.paste(large, (x + (cell - large.width) // 2, y + (cell - large.height) // 2))
        for number, line in enumerate(_wrapped(text, cell, font, lines)):
            draw.text((x, y + cell + 6 + number * line_height), line, font=font, fill=INK)
    return page


def _wrapped(text: str, width: int, font: Any, most: int) -> list[str]:
    """`text` in at most `most` lines no wider than `width` pixels, broken at spaces where possible."""
    # Pillow's own font has no accented letters; samples.txt beside the sheet has the text as it is.
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    lines = [""]
    for word in plain.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        while font.getlength(word) > width:  # one word wider than the cell
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    lines = [line for line in lines if line]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]


def save_image(image: Image.Image, path: str | Path, scale: int = 1) -> Path:
    """Write a sprite as .png, .jpg or .svg by the suffix of `path`; each pixel `scale` wide."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        return save_png(enlarge(image, scale), path)
    if suffix in (".jpg", ".jpeg"):
        buffer = io.BytesIO()
        # Full colour resolution: the usual halving smears the edges of pixels.
        enlarge(image, scale).convert("RGB").save(buffer, format="JPEG", quality=95, subsampling=0)
        return write_bytes(path, buffer.getvalue())
    if suffix == ".svg":
        return write_bytes(path, svg(image, scale).encode())
    raise ValueError(f"{path}: an image is written as .png, .jpg or .svg")


def svg(image: Image.Image, scale: int = 1) -> str:
    """A sprite as SVG, one rectangle for each run of equal pixels of a line."""
    rgb = image.convert("RGB")
    width, height = rgb.size
    pixels = rgb.load()
    assert pixels is not None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * scale}" height="{height * scale}" '
        f'viewBox="0 0 {width} {height}" shape-rendering="crispEdges">'
    ]
    for y in range(height):
        x = 0
        while x < width:
            stop = x + 1
            while stop < width and pixels[stop, y] == pixels[x, y]:
                stop += 1
            red, green, blue = pixels[x, y]  # type: ignore[misc]
            parts.append(
                f'<rect x="{x}" y="{y}" width="{stop - x}" height="1" fill="#{red:02x}{green:02x}{blue:02x}"/>'
            )
            x = stop
    return "\n".join([*parts, "</svg>"]) + "\n"
