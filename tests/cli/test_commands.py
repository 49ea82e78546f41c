"""The commands as a user types them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelbytes import runs
from pixelbytes.dataset import PxByDataset
from pixelbytes.models import from_pretrained

TINY = ["--model", "rnn", "--dim", "16", "--depth", "1", "--max-steps", "3", "--device", "cpu", "--processes", "1"]
FILES = {
    "config.json",
    "tokenizer.json",
    "best",
    "last",
    "metrics.json",
    "training_progress.csv",
    "loss.png",
    "samples.png",
    "samples.txt",
}


def test_no_task_prints_help(command):
    code, out, err = command()
    assert (code, err) == (0, "")
    for task in ("build", "train", "evaluate", "generate", "info"):
        assert re.search(rf"^ +{task} ", out, re.MULTILINE)
        code, text, _ = command(task, "--help")
        assert code == 0 and "usage: pixelbytes " + task in text
    assert command("--version")[1].startswith("pixelbytes ")


def test_help_needs_no_torch():
    code = "import sys; from pixelbytes.cli import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_run_holds_what_it_should(trained):
    assert {p.name for p in trained.iterdir()} == FILES
    table = list(csv.DictReader((trained / "training_progress.csv").open()))
    assert table[-1]["Steps"] == "3"
    metrics = json.loads((trained / "metrics.json").read_text())["metrics"]
    assert {"pixel", "text", "structure", "all"} == set(metrics)
    assert set(metrics["pixel"]["baselines"]) == {"majority", "copy", "copy_up"}
    for name in ("loss.png", "samples.png"):
        with Image.open(trained / name) as image:
            assert image.format == "PNG" and min(image.size) > 100
    assert type(from_pretrained(trained / "best")).__name__ == "SimpleSeqModel"


def test_runs_are_numbered_and_never_overwritten(command, data_folder):
    for number in ("001", "002"):
        code, out, _ = command("train", "--data", data_folder, *TINY)
        assert code == 0 and f"run: runs/rnn-{number}" in out
    before = Path("runs/rnn-001/config.json").read_bytes()
    code, _, err = command("train", "--data", data_folder, "--run", "runs/rnn-001", *TINY)
    assert code == 2 and "runs/rnn-001 exists" in err and "--resume" in err
    assert Path("runs/rnn-001/config.json").read_bytes() == before
    code, out, _ = command("evaluate", "--split", "val")
    assert code == 0 and "pixel" in out
    assert Path("runs/rnn-002/metrics-val-best.json").is_file()  # the newest run is meant when none is named


def test_resume_goes_on(command, run):
    code, out, _ = command("train", "--run", run, "--resume", "--max-steps", 6)
    assert code == 0
    assert list(csv.DictReader((run / "training_progress.csv").open()))[-1]["Steps"] == "6"
    assert json.loads((run / "config.json").read_text())["train"]["max_steps"] == 6
    code, _, err = command("train", "--run", run, "--resume", "--dim", 32)
    assert code == 2 and "dim: a run that goes on keeps its 16" in err
    code, _, err = command("train", "--resume")
    assert code == 2 and "--run" in err


@pytest.mark.parametrize("suffix", ["png", "svg", "jpg", "txt"])
def test_generate_writes_image_and_text(command, trained, suffix):
    code, out, _ = command(
        "generate", "--run", trained, "--prompt", "chat", "--out", f"made.{suffix}", "--seed", 1, "--max-tokens", 900
    )
    assert code == 0
    text = Path("made.txt").read_text()
    assert text.startswith("chat") and repr(text[:-1]) in out
    assert {p.name for p in Path().iterdir()} == {"made.txt", f"made.{suffix}"}
    first = Path(f"made.{suffix}").read_bytes()
    options = ["--run", trained, "--prompt", "chat", "--seed", 1, "--max-tokens", 900]
    assert command("generate", *options, "--out", f"again.{suffix}")[0] == 0
    assert Path(f"again.{suffix}").read_bytes() == first
    if suffix in ("png", "jpg"):
        size = re.search(r"(\d+) x (\d+) pixels", out)
        with Image.open(f"made.{suffix}") as image:
            assert image.size == (8 * int(size[1]), 8 * int(size[2]))


def test_generate_reads_an_image(command, run, data_folder):
    code, out, _ = command("generate", "--run", run, "--image", data_folder / "item03.png", "--scale", 1, "--seed", 0)
    assert code == 0 and "generated-001.png" in out
    with Image.open(run / "generated-001.png") as made, Image.open(data_folder / "item03.png") as given:
        assert np.array_equal(np.asarray(made), np.asarray(given))
    Image.new("RGB", (300, 200), "red").save("large.png")
    code, out, _ = command("generate", "--run", run, "--image", "large.png", "--count", 2, "--format", "svg")
    assert code == 0 and out.count("25 x 17 pixels") == 2
    assert (run / "generated-002-001.svg").is_file() and (run / "generated-002-002.txt").is_file()


def test_evaluate_on_other_data(command, run, data_folder):
    code, out, _ = command("evaluate", "--run", run, "--checkpoint", "last", "--data", data_folder)
    assert code == 0 and "12 items" in out
    assert (run / f"metrics-{data_folder.name}-last.json").is_file()


def test_info_tells_of_installation_and_run(command, trained):
    code, out, _ = command("info")
    assert code == 0
    assert "compat    113 ids" in out and "reference " in out and "1606 items" in out and "CC BY-SA 4.0" in out
    code, out, _ = command("info", trained)
    assert code == 0 and "model: rnn" in out and "checkpoints: best, last" in out and "copy up" in out


def test_build_then_train(command):
    source = Path("mine")
    source.mkdir()
    for index in range(5):
        picture = Image.new("RGB", (60, 40), "white")
        picture.paste((200, 30 * index, 60), (5, 5, 45, 35))
        picture.save(source / f"p{index}.png")
        (source / f"p{index}.txt").write_text("Été rouge")
    code, out, _ = command("build", "--source", "folder", "--path", source, "--out", "sprites", "--max-size", 8)
    assert code == 0 and "5 items" in out
    code, out, _ = command("train", "--data", "sprites", "--vocab", "bytes", "--run", "r", *TINY)
    assert code == 0, out
    assert "ete" not in Path("r/samples.txt").read_text() and "Été" in Path("r/samples.txt").read_text()


def test_the_default_job_on_a_few_items(command):
    code, out, _ = command("train", "--limit", 12, "--max-steps", 1, "--dim", 16, "--depth", 1, "--device", "cpu")
    assert code == 0
    assert "BysMamba" in out and "causal" in out and "openmoji" in out
    assert f"training: on cpu in {min(torch.get_num_threads(), 2)} process" in out  # two windows a step
    model = from_pretrained("runs/mamba-001/best")
    assert model.causal and model.config.norm


def test_the_papers_objective_is_one_flag_away(command, data_folder):
    options = ["--seq-length", 16, "--max-steps", 2, "--dim", 16, "--state", 4, "--depth", 1, "--device", "cpu"]
    code, out, _ = command("train", "--data", data_folder, "--bidirectional", "--processes", 1, *options)
    assert code == 0 and "bidirectional" in out
    assert not from_pretrained("runs/mamba-001/best").causal
    assert command("generate", "--prompt", "chat", "--seed", 0, "--max-tokens", 60)[0] == 0


def test_ctrl_c_leaves_a_run_that_goes_on(data_folder, tmp_path):
    run = tmp_path / "run"
    program = "import sys; from pixelbytes.cli import main; sys.exit(main())"
    options = [a for a in TINY if a not in ("--max-steps", "3")]  # of an option given twice the second counts
    options += ["--processes", "2", "--max-minutes", "1", "--data", str(data_folder)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, "train", "--run", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Average Training Loss" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
    out, err = process.communicate(timeout=60)  # to the end of stdout, which every process of it holds
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Interrupted in epoch" in out
    assert from_pretrained(run / "last") is not None
    saved = torch.load(run / "last" / "checkpoint.pth", weights_only=True)
    assert saved["progress"]["step"] > 0
    steps = str(saved["progress"]["step"] + 1)
    arguments = ["train", "--run", str(run), "--resume", "--max-steps", steps]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in run.iterdir()} == FILES


def test_mirror_images_are_for_training_only(command, data_folder, monkeypatch):
    side = shutil.copytree(data_folder, Path("side"))
    for file in side.glob("*.txt"):
        file.write_text("chat à gauche" if file.stem in ("item00", "item01", "item02") else "chat")
    made = []

    def recorded(rows, *arguments, **options):
        made.append(rows)
        return PxByDataset(rows, *arguments, **options)

    monkeypatch.setattr(runs, "PxByDataset", recorded)
    options = ["--data", "side", "--vocab", "bytes", *TINY]
    lines = []
    for flags in ([], ["--no-mirror"]):
        code, out, err = command("train", "--run", f"run{len(lines)}", *options, *flags)
        assert code == 0, err
        lines.append(out.splitlines()[0])
    train, val, test = runs.open_run("run0").corpora()
    sided = sum("gauche" in caption for caption in train.captions)
    assert 0 < sided < len(train) == 10
    assert f"with mirror images of {10 - sided}, " in lines[0] and "mirror" not in lines[1]
    tokens = [sum(map(len, made[i])) - len(made[i]) for i in (0, 2)]  # a null start each
    assert [f"{n:,} training tokens" in line for n, line in zip(tokens, lines, strict=True)] == [True, True]
    assert [len(rows) for rows in made] == [20 + 2 * (10 - sided), 2, 20, 2]
    assert [np.array_equal(a, b) for a, b in zip(made[1], made[3], strict=True)] == [True, True]
    measured = [json.loads(Path(f"run{i}/metrics.json").read_text())["metrics"] for i in (0, 1)]
    assert [m["pixel"]["targets"] for m in measured] == [sum(i.width * i.height for i in test.images) * 2] * 2


def test_a_run_from_before_mirror_images_goes_on_without(command, data_folder):
    assert command("train", "--data", data_folder, "--run", "old", "--no-mirror", *TINY)[0] == 0
    path = Path("old/config.json")
    described = json.loads(path.read_text())
    del described["train"]["mirror"]
    path.write_text(json.dumps(described))
    code, _, err = command("train", "--run", "old", "--resume", "--mirror", "--max-steps", 6)
    assert code == 2 and "mirror: a run that goes on keeps its False, got True" in err
    code, out, err = command("train", "--run", "old", "--resume", "--max-steps", 6)
    assert code == 0 and "mirror" not in out, err
    assert json.loads(path.read_text())["train"]["mirror"] is False
