"""What goes wrong by the user's hand: exit code 2, one line that names the file or argument, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = ["--model", "rnn", "--dim", "16", "--depth", "1", "--max-steps", "1", "--device", "cpu", "--processes", "1"]


@pytest.fixture
def refused(command):
    """Run a command that must fail; returns its one line."""

    def call(*arguments):
        code, _, err = command(*arguments)
        lines = [line for line in err.split("\n") if line]
        assert code == 2, err
        assert len(lines) == 1 and lines[0].startswith("pixelbytes: error: "), err
        assert "Traceback" not in err
        return lines[0]

    return call


def make_data(count=4, folder="data"):
    folder = Path(folder)
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (4, 4), (200, 40 * index, 0)).save(folder / f"i{index}.png")
        (folder / f"i{index}.txt").write_text("a cat")
    return folder


def test_arguments(refused):
    assert "--dim" in refused("train", "--dim", "wide")
    assert "--model" in refused("train", "--model", "resnet50")
    assert "invalid choice: 'play'" in refused("play")
    assert "dim must be at least 1" in refused("train", "--dim", "0")
    assert "learning_rate must be positive" in refused("train", "--learning-rate", "-1")
    assert "beta2 must lie in 0 <= beta2 < 1" in refused("train", "--beta2", "1")
    assert "leak" in refused("train", "--bidirectional", "--targets", "all")
    assert "device: 'tpu9' cannot be used" in refused("train", "--limit", "5", "--device", "tpu9")
    assert not Path("runs").exists()
    assert "fp16 needs a CUDA device" in refused("train", "--limit", "5", "--amp", "fp16", *TINY)
    assert list(Path("runs").iterdir()) == []


def test_empty_and_missing_data(refused):
    Path("empty").mkdir()
    assert "empty: no images" in refused("train", "--data", "empty", *TINY)
    assert "nowhere: not a folder" in refused("train", "--data", "nowhere", *TINY)
    make_data(2, "two")
    assert "2 item(s) are too few" in refused("train", "--data", "two", *TINY)
    assert not Path("runs").exists()


def test_caption_missing(refused):
    (make_data() / "i2.txt").unlink()
    assert "i2.txt" in refused("train", "--data", "data", *TINY)


def test_broken_image(refused, trained):
    (make_data() / "i1.png").write_bytes(b"no image")
    assert "i1.png" in refused("train", "--data", "data", *TINY)
    assert "i1.png" in refused("generate", "--run", trained, "--image", "data/i1.png")
    assert "gone.png" in refused("generate", "--run", trained, "--image", "gone.png")


def test_image_without_content(refused, trained):
    Image.new("RGBA", (90, 90), (0, 0, 0, 0)).save("blank.png")
    assert "blank.png: no content" in refused("generate", "--run", trained, "--image", "blank.png")


def test_image_too_large_for_tokens(refused):
    Image.new("RGB", (200, 4), "red").save(make_data() / "i3.png")
    assert "i3.png" in refused("train", "--data", "data", *TINY)


def test_unknown_characters(refused, trained):
    assert "no character of '日本'" in refused("generate", "--run", trained, "--prompt", "日本")


def test_sequences_shorter_than_the_window(refused):
    make_data()
    line = refused("train", "--data", "data", "--seq-length", "500", *TINY)
    assert "seq_length: windows of 500 tokens are longer than every sequence" in line
    assert not Path("runs").exists()


def test_corrupt_checkpoints(refused, run):
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for task in ("generate", "evaluate"):
        assert "best/model.safetensors is damaged" in refused(task, "--run", run)
    (run / "last" / "checkpoint.pth").write_bytes(b"garbage")
    assert "last/checkpoint.pth is damaged" in refused("train", "--run", run, "--resume", "--max-steps", "9")


def test_damaged_run_folders(refused, run):
    assert "nowhere: no such run folder" in refused("evaluate", "--run", "nowhere")
    assert "runs: no run there" in refused("generate")
    described = json.loads((run / "config.json").read_text())
    for damage in ("{", "[]", json.dumps(described | {"train": {"nonsense": 1}})):
        (run / "config.json").write_text(damage)
        assert "config.json" in refused("info", run)
    (run / "config.json").write_text(json.dumps(described))
    (run / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused("generate", "--run", run)


def test_a_data_card_that_is_none(refused):
    for damage in ("{", '{"palette": ["red"]}', "[]"):
        folder = make_data(folder=f"data{len(damage)}")
        (folder / "card.json").write_text(damage)
        assert "card.json" in refused("train", "--data", folder, *TINY)


def test_folders_that_cannot_be_written(refused):
    """Below a file no folder can be made, not even by root."""
    make_data()
    Path("file").write_text("")
    assert "file/run" in refused("train", "--data", "data", "--run", "file/run", *TINY)
    assert "file exists" in refused("train", "--data", "data", "--run", "file", *TINY)
    Path("runs").write_text("")
    assert "runs" in refused("train", "--data", "data", *TINY)


def test_files_to_generate(refused, trained):
    assert "out.bmp should end in" in refused("generate", "--run", trained, "--out", "out.bmp")
    assert "out.png should end in .svg" in refused("generate", "--run", trained, "--out", "out.png", "--format", "svg")
    assert "count must be at least 1" in refused("generate", "--run", trained, "--count", "0")
    assert "scale must be at least 1" in refused("generate", "--run", trained, "--scale", "0")
    assert "temperature" in refused("generate", "--run", trained, "--temperature", "-1")
    assert "keep_rows" in refused("generate", "--run", trained, "--keep-rows", "2")
    assert list(Path().iterdir()) == []


def test_rows_of_wrong_shape_dtype_and_range():
    """The windows a notebook hands over: each fault names the row."""
    from pixelbytes.dataset import PxByDataset

    good = np.zeros((9, 3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"rows\[1\].*\(L, 3, 3\)"):
        PxByDataset([good, good[:, :2]])
    with pytest.raises(TypeError, match=r"rows\[1\].*integers"):
        PxByDataset([good, good + 0.5])
    with pytest.raises(ValueError, match=r"rows\[1\].*0\.\.112"):
        PxByDataset([good, good + 113], vocab_size=113)
    with pytest.raises(ValueError, match="rows is empty"):
        PxByDataset([])


def test_a_full_disk_leaves_no_half_run(trained, tmp_path):
    """A limit on the size of files stands for the full disk: the sample sheet does not fit, the text is not written."""
    out = tmp_path / "made.png"
    program = (
        "import resource, sys; from pixelbytes.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)); sys.exit(main())"
    )
    arguments = ["generate", "--run", str(trained), "--prompt", "a chat that is longer than that", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pixelbytes: error: cannot write" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
