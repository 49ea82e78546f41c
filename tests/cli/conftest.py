"""A small data folder and a run trained on it for a few steps."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pixelbytes.cli import main
from pixelbytes.palette import NES55

TINY = ["--model", "rnn", "--dim", "16", "--depth", "1", "--max-steps", "3", "--device", "cpu", "--processes", "1"]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(12):
        picture = np.full((5, 6, 3), 252, np.uint8)
        picture[1:4, 1:4] = NES55[index + 5]
        Image.fromarray(picture).save(folder / f"item{index:02d}.png")
        (folder / f"item{index:02d}.txt").write_text(("chat rouge", "blue dog", "un poisson")[index % 3])
    return folder


@pytest.fixture(scope="session")
def trained(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "--data", str(data_folder), "--run", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, to be changed at will."""
    import shutil

    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; returns exit code, stdout and stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
