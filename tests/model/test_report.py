"""Pictures of a run."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from pixelbytes.report import chart, loss_curve, save_image, sheet, ticks


def sprite():
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 2, (5, 7, 1), dtype=np.uint8).repeat(3, 2) * 200)


def test_ticks_are_round_and_inside():
    for low, high in [(0.0, 1.0), (1.37, 4.9), (-3.0, 250.0), (0.001, 0.0017)]:
        found = ticks(low, high)
        assert 3 <= len(found) <= 12
        assert low <= found[0] and found[-1] <= high * (1 + 1e-9)
        step = found[1] - found[0]
        assert round(step / 10 ** np.floor(np.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert ticks(2.0, 2.0) == [2.0]


def test_loss_curve_shows_each_series(tmp_path):
    history = [
        {"epoch": e, "train_loss": 4 / e, "val_loss": None if e % 2 else 5 / e, "test_loss": None} for e in range(1, 9)
    ]
    with Image.open(loss_curve(history, tmp_path / "loss.png")) as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(47, 111, 208), (217, 84, 43)} <= colours  # training and validation
    assert (42, 157, 92) not in colours  # no test part, no line for it
    loss_curve(history[:1], tmp_path / "one.png")
    with pytest.raises(ValueError, match="not one point"):
        chart({"a": []}, title="", x_label="", y_label="")


def test_files_show_the_sprite_pixel_by_pixel(tmp_path):
    pixels = np.asarray(sprite())
    with Image.open(save_image(sprite(), tmp_path / "a.png", 3)) as png:
        assert np.array_equal(np.asarray(png.convert("RGB")), pixels.repeat(3, 0).repeat(3, 1))
    with Image.open(save_image(sprite(), tmp_path / "a.jpg", 8)) as jpg:
        assert jpg.size == (56, 40)
        middle = np.asarray(jpg.convert("RGB")).astype(int)[4::8, 4::8]
    assert np.abs(middle - pixels).max() < 40  # JPEG is lossy
    root = ET.parse(save_image(sprite(), tmp_path / "a.svg", 4)).getroot()
    assert (root.get("width"), root.get("viewBox")) == ("28", "0 0 7 5")
    drawn = np.full_like(pixels, 255)
    for rect in root:
        x, y, width = (int(rect.get(key)) for key in ("x", "y", "width"))
        drawn[y, x : x + width] = list(bytes.fromhex(rect.get("fill")[1:]))
    assert np.array_equal(drawn, pixels)
    for wrong in ("a.bmp", "a"):
        with pytest.raises(ValueError, match=r"\.png, \.jpg or \.svg"):
            save_image(sprite(), tmp_path / wrong)
    with pytest.raises(ValueError, match="scale must be at least 1"):
        save_image(sprite(), tmp_path / "a.png", 0)


def test_sheet_holds_whatever_comes():
    page = sheet([(sprite(), "été: a text that is much too long " * 9), (None, "x" * 300), (sprite(), "")], columns=2)
    assert page.width == 2 * 194 + 14
    assert page.getpixel((14 + 5 + 180 // 2, 14 + 90)) in {(0, 0, 0), (200, 200, 200)}
