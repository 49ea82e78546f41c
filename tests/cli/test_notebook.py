"""The notebook runs, cell by cell, without the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.py"


@pytest.mark.parametrize("model", ["attention", "mamba"])
def test_the_notebook_runs(model, tmp_path):
    # Port 9 of this machine answers nobody: the hub is out of reach wherever the test runs.
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run(
        [sys.executable, str(NOTEBOOK), "--items", "10", "--epochs", "1", "--model", model],
        cwd=tmp_path,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert "is out of reach" in lines[0] and "OpenMoji" in lines[0]
    assert lines[1].startswith("Epoch 1/1, Average Training Loss: ")
    assert lines[-1].startswith("Best Test Accuracy: ")


def test_star_imports_give_the_notebooks_names():
    names: dict[str, object] = {}
    for module in ("mambabys", "train", "dataset", "tokenizer"):
        exec(f"from pixelbytes.{module} import *", names)
    wanted = {"BysMamba", "MambaConfig", "PxByEmbed", "SimpleSeqModel", "SimpleAttentionModel"}
    assert wanted | {"Trainer", "PxByDataset", "PixelBytesTokenizer"} <= names.keys()
    assert len(names["PixelBytesTokenizer"]().vocab) == 113  # type: ignore[operator]
