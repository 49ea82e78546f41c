from __future__ import annotations

import numpy as np
import pytest

from pixelbytes.palette import NES55, check_palette, load_palette, nearest, rgb_to_lab, white_index


def test_nes55_is_upstreams_order() -> None:
    """Ids 58.. of every upstream checkpoint hang on this order."""
    assert NES55.shape == (55, 3) and NES55.dtype == np.uint8
    first = "000000 fcfcfc f8f8f8 bcbcbc 7c7c7c a4e4fc 3cbcfc 0078f8 0000fc b8b8f8 6888fc 0058f8 0000bc"
    last = "b8f8d8 58f898 00a844 005800 00fcfc 00e8d8 008888 004058 f8d8f8 787878"
    assert NES55[:13].tobytes() == bytes.fromhex(first)
    assert NES55[-10:].tobytes() == bytes.fromhex(last)
    assert len(np.unique(NES55, axis=0)) == 55


def test_lab_of_known_colours() -> None:
    """CIELAB of sRGB primaries, D65, as colour references print them to two decimals."""
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    lab = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.74, -86.18, 83.18], [32.30, 79.19, -107.86]]
    assert np.abs(rgb_to_lab(rgb) - lab).max() <= 0.02


def test_nearest_equals_brute_force_and_keeps_palette_colours() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    lab, table = rgb_to_lab(rgb), rgb_to_lab(NES55)
    expected = ((lab[:, :, None] - table) ** 2).sum(-1).argmin(-1)
    assert np.array_equal(nearest(rgb), expected)
    assert np.array_equal(nearest(NES55[None]), np.arange(55)[None])
    assert NES55[white_index()].tolist() == [0xFC, 0xFC, 0xFC]


def test_nearest_is_not_rgb_distance() -> None:
    """A colour where the two metrics disagree, so that a silent switch of the metric is seen."""
    palette = np.array([[0, 0, 252], [0, 88, 0]], dtype=np.uint8)
    colour = np.array([[20, 20, 110]], dtype=np.uint8)
    rgb_choice = ((palette.astype(int) - colour) ** 2).sum(-1).argmin()
    assert rgb_choice == 1
    assert nearest(colour, palette)[0] == 0


def test_load_gpl_and_hex(tmp_path) -> None:
    gpl = tmp_path / "a.gpl"
    gpl.write_text("GIMP Palette\nName: x\nColumns: 4\n# note\n255 0 0\tred\n  0 255   0 green\n255 0 0 again\n")
    assert load_palette(gpl).tolist() == [[255, 0, 0], [0, 255, 0]]
    text = tmp_path / "a.hex"
    text.write_text("; note\nff0000\n#00ff00\n\n0000FF\n")
    assert load_palette(text).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_pal_of_the_same_machine_gives_nes55(tmp_path) -> None:
    hardware = np.zeros((64, 3), dtype=np.uint8)
    order = [0x0D] + [r + c for c in range(13) for r in (0x30, 0x20, 0x10, 0)] + [0x3D, 0x2D]
    hardware[order] = NES55
    (tmp_path / "nes.pal").write_bytes(hardware.tobytes())
    assert np.array_equal(load_palette(tmp_path / "nes.pal"), NES55)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gpl", b"Palette\n1 2 3\n", "line 1"),
        ("a.gpl", b"GIMP Palette\n1 2 300\n", "line 2"),
        ("a.gpl", b"GIMP Palette\n", "no colours"),
        ("a.hex", b"ff00\n", "line 1"),
        ("a.hex", b"\xff\xfe\xff", "not a text file"),
        ("a.pal", b"\0" * 191, "192 bytes"),
        ("a.py", b"raise SystemExit", "unknown palette suffix"),
    ],
)
def test_bad_palette_files_are_named(tmp_path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_palette(path)
    assert name in str(error.value)


def test_bad_palettes() -> None:
    with pytest.raises(ValueError, match="same colour twice"):
        check_palette([[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="shape"):
        check_palette(np.zeros((0, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"0\.\.255"):
        check_palette([[1, 2, 256]])
    with pytest.raises(TypeError, match="integers"):
        check_palette([[0.5, 0.5, 0.5]])
    with pytest.raises(TypeError, match="uint8"):
        nearest(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
        nearest(np.zeros((2, 4), dtype=np.uint8))
