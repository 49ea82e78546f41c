"""The command line: build a data set, train, evaluate, generate, and tell what is installed.

Parse, make the settings, call a function that a notebook could call too. Exit codes: 0 done, 2 an error that the user
can mend (one line on stderr), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from pixelbytes import __version__
from pixelbytes.config import CHOICES, TrainConfig

# What a user's input can cause. Anything else is a defect of this program and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pixelbytes: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Read when torch loads its OpenMP: idle threads sleep instead of spinning. On a machine that does anything else at the same time
    # a spinning thread holds the core that the working one waits for, and training was four to six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.task is None:
        parser.print_help()
        return 0
    try:
        arguments.call(arguments)
    except KeyboardInterrupt:
        print("pixelbytes: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `pixelbytes info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("PIXELBYTES_TRACEBACK"):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"pixelbytes: error: {reason}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser with its five tasks."""
    parser = _Parser(
        prog="pixelbytes",
        description="Text and small pixel images as one sequence: train a model on it, let it draw and write.",
        epilog="PIXELBYTES_TRACEBACK=1 shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"pixelbytes {__version__}")
    tasks = parser.add_subparsers(dest="task", metavar="task", parser_class=_Parser)
    _build_parser(tasks)
    _train_parser(tasks)
    _evaluate_parser(tasks)
    _generate_parser(tasks)
    info = tasks.add_parser("info", help="what is installed, which kernels run, what is in a run")
    info.add_argument("run", nargs="?", help="a run folder")
    info.set_defaults(call=_info)
    return parser


def _build_parser(tasks: Any) -> None:
    build = tasks.add_parser(
        "build",
        help="make a data set of sprites and captions",
        description="Make a data folder of NAME.png + NAME.txt with a data card: pictures are cropped to their "
        "content, shrunk in proportion, and take the nearest of the palette's colours.",
    )
    build.add_argument("--source", choices=("openmoji", "folder"), default="openmoji", help="default openmoji")
    build.add_argument("--path", help="for folder: the folder of NAME.png (or jpg, webp, gif, bmp) + NAME.txt")
    build.add_argument("--out", help="data folder to make (default data-SOURCE)")
    build.add_argument("--pack", help="write one packed file (.npz) as well; without --out instead")
    build.add_argument("--palette", help=".gpl, .hex or .pal (192 bytes); default: 55 NES colours")
    build.add_argument("--max-size", type=int, default=25, metavar="N", help="longest side in pixels (default 25)")
    build.add_argument("--method", choices=("mode", "mean"), default="mode", help="mode: drawings; mean: photographs")
    build.add_argument("--text-ratio", type=float, metavar="X", help="share of text among the tokens, 0 to 1")
    build.add_argument("--limit", type=int, metavar="N", help="at most this many items, drawn by --seed")
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw for --limit (default 0)")
    build.add_argument("--licence", help="for folder: licence of pictures and texts, for the data card")
    build.add_argument("--cldr", help="for openmoji: unpacked cldr-annotations-full to take texts from")
    build.add_argument("--strict", action="store_true", help="stop at the first broken item instead of leaving it out")
    build.add_argument("--overwrite", action="store_true", help="replace an older data folder of that name")
    build.set_defaults(call=_build)


def _train_parser(tasks: Any) -> None:
    train = tasks.add_parser(
        "train",
        help="train a model; with no options a small one on the embedded set, in a few minutes",
        description="Train, then evaluate on items never trained on, beside trivial baselines, and draw samples. "
        "Everything goes to a run folder. Ctrl-C leaves a run that --resume continues.",
    )
    train.add_argument("--run", help="run folder; default: runs/MODEL-001, or the next free number")
    train.add_argument("--resume", action="store_true", help="continue the run, with its settings")
    hints = typing.get_type_hints(TrainConfig)
    for setting in fields(TrainConfig):
        flag = "--" + setting.name.replace("_", "-")
        default = setting.default
        text = setting.metadata["help"]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"train.{setting.name}"}
        if isinstance(default, bool):
            help_text = f"{text} (default {'yes' if default else 'no'})"
            train.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text, **options)
            continue
        if setting.name in CHOICES:
            options["choices"] = CHOICES[setting.name]
        options["type"] = _plain_type(hints[setting.name])
        shown = "" if default is None else f" (default {default})"
        if setting.name not in CHOICES:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[options["type"]]
        train.add_argument(flag, help=text + shown, **options)
    train.set_defaults(call=_train)


def _plain_type(hint: Any) -> type:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def _evaluate_parser(tasks: Any) -> None:
    evaluate = tasks.add_parser(
        "evaluate",
        help="accuracy and loss for pixels, text and structure, beside trivial baselines",
        description="Evaluate a run's model. The table is also written to the run folder as JSON.",
    )
    _run_options(evaluate)
    evaluate.add_argument("--split", choices=("test", "val", "train"), default="test", help="items of the run's data")
    evaluate.add_argument("--data", help="evaluate on all items of this data folder instead")
    evaluate.set_defaults(call=_evaluate)


def _generate_parser(tasks: Any) -> None:
    generate = tasks.add_parser(
        "generate",
        help="draw from a text, write for an image, or make up both",
        description="With --prompt the model completes the text and draws it; with --image it writes a caption; with "
        "neither it makes up both. The image and its text (.txt) are written, and their paths printed.",
    )
    _run_options(generate)
    generate.add_argument("--prompt", help="beginning of the text")
    generate.add_argument("--exact", action="store_true", help="the prompt is the whole text: do not complete it")
    generate.add_argument("--image", help="picture to write for; larger ones are made sprites of 25 pixels first")
    generate.add_argument("--keep-rows", type=int, help="keep this many lines of --image, let the model draw the rest")
    generate.add_argument("--out", help="file to write (.png, .svg, .jpg or .txt); default: RUN/generated-001.FORMAT")
    generate.add_argument(
        "--format", choices=("png", "svg", "jpg", "txt"), help="when --out is not given (default png)"
    )
    generate.add_argument("--count", type=int, default=1, help="how many (default 1); several get numbers")
    generate.add_argument("--scale", type=int, default=8, help="pixels a pixel (default 8)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest always (default 0.8)")
    generate.add_argument("--top-k", type=int, help="draw from the k likeliest only")
    generate.add_argument("--seed", type=int, help="of the draw; the same seed gives the same result")
    generate.add_argument("--max-tokens", type=int, default=1024, help="longest sequence (default 1024)")
    generate.add_argument("--free", action="store_true", help="do not hold the model to well-formed images")
    generate.set_defaults(call=_generate)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run folder; default: the newest in runs/")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which model (default best)")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")


def _build(arguments: argparse.Namespace) -> None:
    from pixelbytes.sources import build

    names = ("path", "pack", "palette", "max_size", "method", "text_ratio", "limit", "seed", "licence", "cldr")
    options = {name: getattr(arguments, name) for name in (*names, "strict", "overwrite")}
    out = arguments.out or (None if arguments.pack else f"data-{arguments.source}")
    build(arguments.source, out, **options)


def _train(arguments: argparse.Namespace) -> None:
    given = {key.removeprefix("train."): value for key, value in vars(arguments).items() if key.startswith("train.")}
    config = None if arguments.resume else TrainConfig(**given)
    from pixelbytes.runs import changed, open_run, train_run

    if config is None:
        if arguments.run is None:
            raise ValueError("--resume: name the run folder with --run")
        config = changed(open_run(arguments.run).config, given)
    train_run(config, arguments.run, resume=arguments.resume)


def _evaluate(arguments: argparse.Namespace) -> None:
    from pixelbytes.runs import evaluate_run, latest_run, open_run

    run = open_run(arguments.run or latest_run())
    evaluate_run(run, arguments.checkpoint, arguments.split, data=arguments.data, device=arguments.device)


def _generate(arguments: argparse.Namespace) -> None:
    from pixelbytes.runs import latest_run, open_run
    from pixelbytes.sampling import generate_files

    generate_files(
        open_run(arguments.run or latest_run()),
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        text=arguments.prompt,
        image=arguments.image,
        exact=arguments.exact,
        keep_rows=arguments.keep_rows,
        out=arguments.out,
        file_format=arguments.format,
        count=arguments.count,
        scale=arguments.scale,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        free=arguments.free,
    )


def _info(arguments: argparse.Namespace) -> None:
    from pixelbytes.info import describe

    print(describe(arguments.run))
