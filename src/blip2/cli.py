"""The command line: build the parser, then run one function per command."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import shtab

from blip2 import __version__
from blip2.config import Stage
from blip2.corpus.command import add_capfilt, add_corpus, add_engine, embed_corpus, make_features_with_engine
from blip2.errors import InputError, escape_control_characters, process_name
from blip2.io import expand_home
from blip2.memory import tune_malloc
from blip2.training.interruption import TrainingInterrupted

Run = Callable[[argparse.Namespace], None]
RECIPE_COMMANDS = ("train", "features")
"""Commands that accept every key of a recipe."""
OVERRIDE = r"--(vision|language|qformer)\.[a-z_]+"
"""Options that override a key of a model's recipe."""
MODEL_FORMATS = "a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth file"
FROZEN_DTYPE = "Data type of the frozen image encoder and LLM (default: the recipe's)."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name. None: those of this process.

    Returns:
        The exit status: 0 on success, 2 if an input or the machine cannot be used, 130 after an interruption, 1 for a
        fault of blip2 or if the reader of the output is gone. Every failure prints one line on stderr; with several
        processes the line names the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may be ASCII only, and file names need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TrainingInterrupted as error:
        with contextlib.suppress(OSError):  # the interruption may have been that the terminal closed
            print(escape_control_characters(error), file=sys.stderr)
        return 130
    except BrokenPipeError:  # for example in `blip2 caption ... | head`
        with contextlib.suppress(OSError, ValueError):  # discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error}: check that it exists, that you may read or write it, and that the disk has room", 2)
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"there is not enough memory ({error}): use smaller batches or a smaller model", 2)
        return _fail_unexpectedly(error)
    return 0


def _fail(message: object, status: int) -> int:
    """Print the error and return the exit status."""
    in_process = f" in {process_name()}" if process_name() else ""
    print(f"error{in_process}: {escape_control_characters(message)}", file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    )


def _fail_unexpectedly(error: Exception) -> int:
    """Report an unexpected error in one line and write the traceback to a file.

    With several processes, or if ``BLIP2_TRACEBACK`` is set, the traceback is printed instead: files may be on
    machines that are gone afterwards.
    """
    report = escape_control_characters(traceback.format_exc(), keep="\n")
    name = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
    if process_name() or os.environ.get("BLIP2_TRACEBACK"):
        print(f"{process_name() or 'blip2'} failed\n{report}", file=sys.stderr)  # one call: processes interleave
        return 1
    try:
        with tempfile.NamedTemporaryFile("w", prefix="blip2-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(report)
    except OSError:
        print(report, file=sys.stderr)
        return _fail(f"{name}, which is a fault of blip2: please report it with the traceback above", 1)
    return _fail(f"{name}, which is a fault of blip2: please report it with the traceback in {file.name}", 1)


def _run(argv: Sequence[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("blip2").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder no longer exists: change to another one") from error
    tune_malloc()
    parser = build_parser()
    arguments, overrides = split_overrides(argv)
    options, rest = parser.parse_known_args(arguments)
    unknown = [] if options.command in RECIPE_COMMANDS else rest
    if not options.takes_overrides:
        unknown = [*unknown, *(f"--{key}" for key in overrides)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.rest, options.overrides = rest, overrides
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if getattr(options, "output", None) is not None:
        options.output = str(expand_home(options.output))
    options.run(options)


class _EscapingFormatter(logging.Formatter):
    """Formats a record as its message alone, with control characters escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escape_control_characters(record.message)


def print_row(*cells: object) -> None:
    """Print cells separated by tabs, with control characters escaped."""
    print("\t".join(escape_control_characters(cell) for cell in cells))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Separate the overrides of recipe keys (``--vision.name eva_vit_g.pth``) from the other arguments.

    The arguments of :data:`RECIPE_COMMANDS` are returned unchanged; the recipe parses them.
    """
    if argv and argv[0] in RECIPE_COMMANDS:
        return list(argv), {}
    arguments: list[str] = []
    overrides: dict[str, object] = {}
    remaining = iter(argv)
    for argument in remaining:
        key, equals, value = argument.partition("=")
        if re.fullmatch(OVERRIDE, key):
            overrides[key.removeprefix("--")] = value if equals else next(remaining, None)
        else:
            arguments.append(argument)
    return arguments, overrides


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="Connect a frozen image encoder to a frozen LLM by training only the Q-Former between them.",
        epilog="A first example: blip2 demo --quick",
    )
    parser.add_argument(
        "--version", action="version", version=f"blip2 {__version__}", help="Print the version, then exit."
    )
    shtab.add_argument_to(parser, "--print-completion", help="Print the completion script for a shell, then exit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        added.set_defaults(run=run, takes_overrides=False)
        return added

    demo = command(
        "demo", run_demo, "Train both stages on generated scenes and report what the models learned.", "blip2 demo"
    )
    demo.add_argument("--quick", action="store_true", help="Run a short version, in two to three minutes.")
    demo.add_argument("--output", default="runs/demo", help="Folder for the results (default: runs/demo).")
    demo.add_argument(
        "--scale",
        type=float,
        help="Multiply the training steps of the recipes by this factor (default: a factor from 1 to 4 such that the"
        " demo takes about 15 minutes on this machine).",
    )
    demo.add_argument(
        "--data", metavar="SOURCE", help="Train on your own images and captions instead: a folder or a table."
    )

    scenes = command(
        "scenes",
        run_scenes,
        "Generate a data set of scenes with captions, questions and exact ground truth (docs/scenes.md).",
        "blip2 scenes scenes-20000 --train 20000 --seed 1",
    )
    scenes.add_argument("output", metavar="FOLDER", help="Folder to create.")
    scenes.add_argument("--seed", type=int, default=0, help="Seed; it determines the data set (default: 0).")
    scenes.add_argument("--train", type=int, default=4000, help="Number of training images (default: 4000).")
    scenes.add_argument(
        "--shards", type=int, help="Also write the training images as this number of WebDataset shards."
    )
    scenes.add_argument("--kinds", nargs="+", metavar="NOUN", help="Kinds of objects to show (default: all).")
    scenes.add_argument(
        "--cutouts",
        metavar="FOLDER",
        help="Use your own cut-outs: a folder with one subfolder of transparent PNG files for each kind.",
    )

    train = commands.add_parser("train", help="Train one stage with a recipe.", add_help=False)
    train.add_argument("recipe", nargs="?")
    train.add_argument("--resume", action="store_true")
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run=run_train, takes_overrides=False)

    features = command(
        "features",
        run_features,
        "Compute and cache the image features that a recipe trains on.",
        "blip2 features demo-stage1 --data.cached_dtype int8",
    )
    features.usage = "blip2 features RECIPE [--KEY VALUE ...]"
    features.description = (
        "Run the frozen image encoder over data.train, in data.cached_views views of each image (1 if the recipe has"
        " 0), and over data.validation. Training with data.cached_views then reads the features. The command can be"
        " interrupted and started again: it continues where it stopped and encodes only new images. Under torchrun or"
        " accelerate launch, each process encodes its share."
    )
    features.add_argument("recipe", metavar="RECIPE", help="A YAML file, or the name of a recipe shipped with blip2.")
    add_engine(features)
    features.epilog = f"blip2 train --help lists the keys --- {features.epilog}"

    caption = command("caption", run_caption, "Caption images.", "blip2 caption runs/demo/stage2 cat.jpg")
    add_model(caption, "generation")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    caption.add_argument("--prompt", help="Text that each caption continues (default: the model's training prompt).")
    add_decoding(caption)

    ask = command("ask", run_ask, "Answer questions about an image.", 'blip2 ask runs/demo/vqa cat.jpg "What is it?"')
    add_model(ask, "generation")
    ask.add_argument("image", metavar="IMAGE", help="An image file.")
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="One or more questions.")
    add_decoding(ask)

    match = command(
        "match",
        run_match,
        "Rank texts by how well they match an image.",
        'blip2 match runs/demo/stage1 cat.jpg "a cat" "a dog"',
    )
    add_model(match, "representation")
    match.add_argument("image", metavar="IMAGE", help="An image file.")
    match.add_argument("texts", nargs="+", metavar="TEXT", help="Texts to compare with the image.")

    embed = command(
        "embed",
        run_embed,
        "Write the embeddings of images and texts to a file.",
        "blip2 embed runs/demo/stage1 *.jpg --output cats.safetensors",
    )
    add_model(embed, "representation")
    embed.add_argument("images", nargs="*", metavar="IMAGE", help="Image files.")
    embed.add_argument("--text", action="append", default=[], metavar="TEXT", help="A text to embed; repeatable.")
    add_corpus(
        embed,
        required=False,
        output="A .safetensors file with images [I, Q, C] and texts [T, C], or with --data a folder.",
    )

    add_capfilt(command)

    evaluate = command(
        "evaluate",
        run_evaluate,
        "Evaluate a model, or a file of predictions, on captioning, VQA or retrieval.",
        "blip2 evaluate runs/mine/stage2 --task vqa --data vqav2:val:/data/coco --output runs/mine/vqav2",
    )
    add_model(evaluate, None, required=False)
    evaluate.add_argument(
        "--predictions", metavar="FILE", help="Score this file of predictions instead of a MODEL (docs/evaluation.md)."
    )
    evaluate.add_argument("--task", required=True, choices=["captioning", "vqa", "retrieval"], help="Task to evaluate.")
    evaluate.add_argument(
        "--data", required=True, metavar="SOURCE", help="Records, in any format of data.train (docs/data.md)."
    )
    evaluate.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="Folder for metrics.json, predictions.json and report.html.",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="Evaluate only the first N records.")
    evaluate.add_argument(
        "--prompt", help="Prompt of captions, or of questions if it contains {} (default: the model's own)."
    )
    evaluate.add_argument(
        "--rerank-k",
        type=int,
        default=128,
        help="Number of candidates that retrieval re-ranks in each direction (default: 128).",
    )
    evaluate.add_argument(
        "--fusion",
        default="itm",
        choices=["itm", "itm+itc"],
        help="Score that re-ranks the candidates of retrieval; LAVIS uses itm+itc (default: itm).",
    )
    evaluate.add_argument(
        "--rules",
        default="official",
        choices=["official", "lavis"],
        help="Rules for comparing answers (default: official).",
    )
    evaluate.add_argument(
        "--lemmatize",
        action="store_true",
        help="Also score lemmatized answers, as is always done for ok-vqa. Requires spaCy.",
    )
    add_decoding(evaluate)

    convert = command(
        "convert",
        run_convert,
        "Convert a checkpoint to the format of transformers, vLLM, LAVIS or blip2.",
        "blip2 convert runs/mine/stage2 mine --to transformers",
    )
    convert.add_argument("source", metavar="SRC", help=f"Checkpoint to convert: {MODEL_FORMATS}.")
    convert.add_argument("target", metavar="DST", help="Folder to create; with --to lavis a .pth file.")
    convert.add_argument(
        "--to", required=True, choices=["transformers", "vllm", "lavis", "blip2"], help="Format of the output."
    )
    convert.add_argument(
        "--stage1",
        metavar="SRC",
        help="With --to transformers: a stage-1 checkpoint with the same Q-Former, whose heads are added to DST.",
    )
    convert.add_argument(
        "--with-language", action="store_true", help="With --to lavis: include the LLM, which LAVIS's files omit."
    )
    accept_overrides(convert)

    push = command(
        "push", run_push, "Upload a converted model to the Hugging Face hub.", "blip2 push mine my-name/my-model"
    )
    push.add_argument("folder", metavar="FOLDER", help="A folder written by blip2 convert.")
    push.add_argument("repo_id", metavar="REPO_ID", help="Repository as OWNER/NAME; created if it does not exist.")
    push.add_argument("--private", action="store_true", help="Make the repository private.")
    return parser


def accept_overrides(parser: argparse.ArgumentParser) -> None:
    """Make a command accept overrides of recipe keys."""
    parser.set_defaults(takes_overrides=True)
    parser.epilog = (
        f"{parser.epilog} --- Keys of the model's recipe can be set too: those that a .pth file does not contain"
        " (--vision.name eva_vit_g.pth --language.name facebook/opt-2.7b), or new values (--vision.image_size 364)."
    )


def add_model(parser: argparse.ArgumentParser, stage: Stage | None, required: bool = True) -> None:
    """Add the argument MODEL and the options for loading it."""
    kind = {"representation": "Stage-1 model", "generation": "Stage-2 model", None: "Model"}[stage]
    parser.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=f"{kind}: {MODEL_FORMATS}.")
    accept_overrides(parser)
    parser.set_defaults(stage=stage)
    parser.add_argument("--device", help="Device to run on: cpu, cuda, cuda:1 or mps (default: a GPU if there is one).")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=FROZEN_DTYPE)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options of text generation."""
    parser.add_argument("--num-beams", type=int, help="Beam width; 1 is greedy decoding (default: 5).")
    parser.add_argument("--top-p", type=float, help="Use nucleus sampling with this probability mass.")
    parser.add_argument("--temperature", type=float, help="Sampling temperature (default: 1).")
    parser.add_argument(
        "--length-penalty",
        type=float,
        help="Length penalty of beam search; values below 0 favor short texts (default: 1, answers -1).",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="Maximum length of a text in tokens (default: 30, answers 10)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of sampling (default: 0).")


def run_demo(options: argparse.Namespace) -> None:
    from blip2.demo.run import demo

    if options.scale is not None and not 0 < options.scale <= 1000:
        raise InputError(f"--scale is {options.scale:g}, expected a number above 0 and at most 1000")
    demo(Path(options.output), quick=options.quick, data=options.data, scale=options.scale)


def run_scenes(options: argparse.Namespace) -> None:
    from blip2.data.scenes import make_scenes

    cutouts = None if options.cutouts is None else Path(options.cutouts)
    output = Path(options.output)
    made = make_scenes(
        output, options.seed, train=options.train, shards=options.shards, cutouts=cutouts, kinds=options.kinds
    )
    for name, rows in made.items():
        print_row(f"{output / name}: {rows} rows")


def run_train(options: argparse.Namespace) -> None:
    from blip2.recipe import find_recipe, load_recipe, recipe_help

    if options.help:
        print(recipe_help())
        print(
            "\nRECIPE is a YAML file, or the name of a recipe shipped with blip2. --resume continues from the last"
            "\ncheckpoint of the run. Every key of a recipe can be overridden on the command line."
            "\n\nexample: blip2 train demo-stage1 --data.batch_size 32"
        )
        return
    if options.recipe is None:
        raise InputError("no recipe was given: run blip2 train RECIPE; blip2 train --help lists the keys of a recipe")
    recipe = load_recipe(find_recipe(options.recipe), options.rest)
    from blip2.evaluation.in_training import train

    print_row(train(recipe, resume=options.resume))


def run_features(options: argparse.Namespace) -> None:
    from blip2.recipe import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(options.recipe), options.rest)
    from blip2.training.features import make_features

    make_features_with_engine(options, recipe)
    for line in make_features(recipe):
        print_row(line)


def run_caption(options: argparse.Namespace) -> None:
    model = _load(options)
    captions = model.caption(options.images, options.prompt, _decoding(options, questions=False))
    for image, caption in zip(options.images, captions, strict=True):
        print_row(*([image] if len(captions) > 1 else []), caption)


def run_ask(options: argparse.Namespace) -> None:
    model = _load(options)
    answers = model.answer(options.image, options.questions, _decoding(options, questions=True))
    for question, answer in zip(options.questions, answers, strict=True):
        print_row(*([question] if len(answers) > 1 else []), answer)


def run_match(options: argparse.Namespace) -> None:
    model = _load(options)
    matches = model.match(options.image, options.texts)[0].tolist()
    similarities = model.similarity(options.image, options.texts)[0].tolist()
    print("match\tsimilarity\ttext")
    for text, match, similarity in sorted(zip(options.texts, matches, similarities, strict=True), key=lambda r: -r[1]):
        print_row(f"{match:.3f}", f"{similarity:.3f}", text)


def run_embed(options: argparse.Namespace) -> None:
    if options.data is not None or options.engine == "ray":
        embed_corpus(options)
        return
    from blip2.corpus.embed import embed

    tensors = embed(
        options.model, options.output, options.images, options.text,
        device=options.device, dtype=options.dtype, overrides=options.overrides,
    )  # fmt: skip
    print_row(", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) + f" -> {options.output}")


def run_evaluate(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.predictions is None):
        found = "both MODEL and" if options.model else "neither MODEL nor"
        raise InputError(f"found {found} --predictions, expected one of them: give the one to score")
    from blip2.config import EvaluationConfig
    from blip2.evaluation.run import evaluate, evaluate_predictions

    given = {key: getattr(options, key) for key in vars(options).keys() & EvaluationConfig.__dataclass_fields__.keys()}
    config = EvaluationConfig(**given)
    if options.predictions is not None:
        metrics = evaluate_predictions(options.predictions, config, options.output)
    else:
        metrics = evaluate(
            options.model, config, options.output, seed=_seed(options), device=options.device, dtype=options.dtype,
            overrides=options.overrides,
        )  # fmt: skip
    print(json.dumps(metrics, indent=1))


def run_convert(options: argparse.Namespace) -> None:
    from blip2.convert import convert

    print_row(
        convert(options.source, options.target, options.to, options.overrides, options.stage1, options.with_language)
    )


def run_push(options: argparse.Namespace) -> None:
    from blip2.hub import push_to_hub

    print_row(push_to_hub(options.folder, options.repo_id, options.private))


def _load(options: argparse.Namespace):
    from blip2.pipelines import load

    # A checkpoint with both stages can be loaded as either one.
    return load(options.model, options.device, options.dtype, overrides=options.overrides, stage=options.stage)


def _decoding(options: argparse.Namespace, questions: bool):
    from transformers import set_seed

    from blip2.pipelines import ANSWER_DECODING, CAPTION_DECODING

    set_seed(_seed(options))
    return (ANSWER_DECODING if questions else CAPTION_DECODING).override(options)


def _seed(options: argparse.Namespace) -> int:
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}, expected 0 to {2**32 - 1}")
    return options.seed


if __name__ == "__main__":
    sys.exit(main())
