"""The command line: one function a command, each thin."""

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
from dataclasses import replace
from pathlib import Path

from blip2.corpus.command import add_capfilt, add_corpus, add_engine, embed_corpus, make_features_on
from blip2.errors import InputError, process_name, visible
from blip2.io import output_path
from blip2.memory import keep_memory
from blip2.training.interruption import Interruption

Run = Callable[[argparse.Namespace], None]
RECIPE_COMMANDS = ("train", "features")
"""They take any key of a recipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 when it is done, 2 for something that cannot be used, in what was given or on the machine,
        130 after an interruption, 1 for a fault of blip2 and when the reader of the output has gone. Whatever it is,
        one line on stderr says so; of several processes each says which it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know ASCII alone, and names need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except InputError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Interruption as error:
        with contextlib.suppress(OSError):  # the terminal may be gone, which is why it was interrupted
            print(visible(error), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `blip2 caption ... | head`
        with contextlib.suppress(OSError, ValueError):  # what is still to be written has no reader either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error}: see that it is there, that it may be read or written, and that there is room", 2)
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"there is not enough memory ({error}): use smaller batches or a smaller model", 2)
        return _fail_unforeseen(error)
    return 0


def _fail(message: object, status: int) -> int:
    """Print why the command ends."""
    in_process = f" in {process_name()}" if process_name() else ""
    print(f"error{in_process}: {visible(message)}", file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    )


def _fail_unforeseen(error: Exception) -> int:
    """Print in one line what nobody has foreseen, and keep the traceback in a file for a report.

    With ``BLIP2_TRACEBACK`` set the traceback is printed, as each of several processes does: their files may lie on
    machines that are gone afterwards.
    """
    told = visible(traceback.format_exc(), keep="\n")
    name = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
    if process_name() or os.environ.get("BLIP2_TRACEBACK"):
        print(f"{process_name() or 'blip2'} failed\n{told}", file=sys.stderr)  # at once, among others' lines
        return 1
    try:
        with tempfile.NamedTemporaryFile("w", prefix="blip2-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(told)
    except OSError:
        print(told, file=sys.stderr)
        return _fail(f"{name}, which is a fault of blip2: please report it with the traceback above", 1)
    return _fail(f"{name}, which is a fault of blip2: please report it with the traceback in {file.name}", 1)


def _run(arguments: Sequence[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("blip2").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder is gone: change to one that is there") from error
    keep_memory()
    parser = build_parser()
    given, changes = take_changes(arguments)
    options, rest = parser.parse_known_args(given)
    unknown = [] if options.command in RECIPE_COMMANDS else rest
    if not options.takes_changes:
        unknown = [*unknown, *(f"--{key}" for key in changes)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.rest, options.changes = rest, changes
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if getattr(options, "output", None) is not None:
        options.output = str(output_path(options.output))
    options.run(options)


class _Visible(logging.Formatter):
    """The message alone, as :func:`visible` shows it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return visible(record.message)


def say(*parts: object) -> None:
    """Print a line of parts with tabs between them, each as :func:`visible` shows it."""
    print("\t".join(visible(part) for part in parts))


def take_changes(arguments: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """The keys of a recipe among the arguments (``--vision.name eva_vit_g.pth``), apart from the others.

    Those of :data:`RECIPE_COMMANDS` stay where they are: the recipe reads them.
    """
    if arguments and arguments[0] in RECIPE_COMMANDS:
        return list(arguments), {}
    rest: list[str] = []
    changes: dict[str, object] = {}
    left = iter(arguments)
    for argument in left:
        key, equals, value = argument.partition("=")
        if re.fullmatch(r"--(vision|language|qformer)\.[a-z_]+", key):
            changes[key.removeprefix("--")] = value if equals else next(left, None)
        else:
            rest.append(argument)
    return rest, changes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="BLIP-2: give a frozen language model eyes. Train the Q-Former in two stages, then use it.",
        epilog="begin with: blip2 demo --quick",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        added.set_defaults(run=run, takes_changes=False)
        return added

    demo = command("demo", run_demo, "train both stages on composed scenes and show what was learned", "blip2 demo")
    demo.add_argument("--quick", action="store_true", help="the same in two to three minutes, to see that all works")
    demo.add_argument("--output", default="runs/demo", help="folder of the results (default: runs/demo)")
    demo.add_argument(
        "--scale",
        type=float,
        help="train this many times the recipes' steps (default: what takes about 15 minutes on this machine, 1 to 4)",
    )
    demo.add_argument(
        "--data", metavar="SOURCE", help="your own images with captions in place of the scenes: a folder or a table"
    )

    scenes = command(
        "scenes",
        run_scenes,
        "make a data set of composed scenes with captions, questions and their exact truth (docs/scenes.md)",
        "blip2 scenes scenes-20000 --train 20000 --seed 1",
    )
    scenes.add_argument("output", metavar="FOLDER", help="folder to make")
    scenes.add_argument("--seed", type=int, default=0, help="the same seed gives the same data set (default: 0)")
    scenes.add_argument("--train", type=int, default=4000, help="number of training images (default: 4000)")
    scenes.add_argument("--shards", type=int, help="also write the training images as so many WebDataset shards")
    scenes.add_argument("--kinds", nargs="+", metavar="NOUN", help="kinds of objects to show (default: all)")
    scenes.add_argument(
        "--cutouts", metavar="FOLDER", help="your own cut-outs: a folder of PNG files with transparency for each kind"
    )

    train = commands.add_parser(
        "train",
        help="train one stage as a recipe says",
        add_help=False,
    )
    train.add_argument("recipe", nargs="?")
    train.add_argument("--resume", action="store_true")
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run=run_train, takes_changes=False)

    features = command(
        "features",
        run_features,
        "make the image features that a recipe trains on, without training",
        "blip2 features demo-stage1 --data.cached_dtype int8",
    )
    features.usage = "blip2 features RECIPE [--KEY VALUE ...]"
    features.description = (
        "Run the frozen image encoder once over data.train, in data.cached_views views of each image (1 if the recipe"
        " has 0), and once over data.validation. Training with data.cached_views then reads the features. It can be"
        " killed at any moment and started again: it goes on where it was, and only new pictures are ever encoded."
        " Under torchrun or accelerate launch each process encodes its share."
    )
    features.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that comes with blip2")
    add_engine(features)
    features.epilog = f"blip2 train --help lists the keys --- {features.epilog}"

    caption = command(
        "caption", run_caption, "write a caption for each image", "blip2 caption runs/demo/stage2 cat.jpg"
    )
    add_model(caption, "generation")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    caption.add_argument("--prompt", help="text that the caption continues (default: the one it was trained with)")
    add_decoding(caption)

    ask = command("ask", run_ask, "answer a question about an image", 'blip2 ask runs/demo/vqa cat.jpg "what is it?"')
    add_model(ask, "generation")
    ask.add_argument("image", metavar="IMAGE", help="an image file")
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="one or several questions")
    add_decoding(ask)

    match = command(
        "match", run_match, "tell which texts fit an image", 'blip2 match runs/demo/stage1 cat.jpg "a cat" "a dog"'
    )
    add_model(match, "representation")
    match.add_argument("image", metavar="IMAGE", help="an image file")
    match.add_argument("texts", nargs="+", metavar="TEXT", help="texts to compare it with")

    embed = command(
        "embed",
        run_embed,
        "write the embeddings of images and texts to a file",
        "blip2 embed runs/demo/stage1 *.jpg --output cats.safetensors",
    )
    add_model(embed, "representation")
    embed.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    embed.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text to embed; can be repeated")
    add_corpus(
        embed, required=False, holds="a .safetensors file with images [I, Q, C] and texts [T, C]; of --data a folder"
    )

    add_capfilt(command)

    evaluate = command(
        "evaluate",
        run_evaluate,
        "score a model, or a file of predictions, on records: captions, answers or retrieval",
        "blip2 evaluate runs/mine/stage2 --task vqa --data vqav2:val:/data/coco --output runs/mine/vqav2",
    )
    add_model(evaluate, None, needed=False)
    evaluate.add_argument(
        "--predictions", metavar="FILE", help="score this file, as predictions.json, in place of a MODEL"
    )
    evaluate.add_argument("--task", required=True, choices=["captioning", "vqa", "retrieval"], help="what to score")
    evaluate.add_argument(
        "--data", required=True, metavar="SOURCE", help="what data.train of a recipe may say (docs/data.md)"
    )
    evaluate.add_argument(
        "--output", required=True, metavar="FOLDER", help="for metrics.json, predictions.json and report.html"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    evaluate.add_argument("--prompt", help="of captions, or of questions with {} in it (default: the model's own)")
    evaluate.add_argument(
        "--rerank-k", type=int, default=128, help="texts an image that are re-ranked in retrieval (default: 128)"
    )
    evaluate.add_argument(
        "--fusion",
        default="itm",
        choices=["itm", "itm+itc"],
        help="what re-ranks them; itm+itc is LAVIS's (default: itm)",
    )
    evaluate.add_argument(
        "--rules",
        default="official",
        choices=["official", "lavis"],
        help="of comparing answers (default: official)",
    )
    evaluate.add_argument(
        "--lemmatize",
        action="store_true",
        help="score answers in base forms as well, which is always done for ok-vqa; needs spaCy",
    )
    add_decoding(evaluate)

    convert = command(
        "convert",
        run_convert,
        "write a checkpoint in another format: transformers, vLLM, LAVIS or this project's",
        "blip2 convert runs/mine/stage2 mine --to transformers",
    )
    convert.add_argument("source", metavar="SRC", help=f"{CHECKPOINT}")
    convert.add_argument("target", metavar="DST", help="folder to make; for lavis a .pth file")
    convert.add_argument("--to", required=True, choices=["transformers", "vllm", "lavis", "blip2"], help="its format")
    convert.add_argument(
        "--stage1",
        metavar="SRC",
        help="for transformers: a stage 1 with the same Q-Former, whose heads go into the folder too",
    )
    convert.add_argument(
        "--with-language", action="store_true", help="for lavis: put the LLM in too, which its own files leave out"
    )
    take_keys(convert)

    push = command(
        "push", run_push, "upload a converted folder to the Hugging Face hub", "blip2 push mine my-name/my-model"
    )
    push.add_argument("folder", metavar="FOLDER", help="what blip2 convert wrote")
    push.add_argument("repository", metavar="NAME", help="owner and name of the repository, made if need be")
    push.add_argument("--private", action="store_true", help="make it private")
    return parser


CHECKPOINT = "run, checkpoint, folder or hub name of transformers' BLIP-2, or .pth of LAVIS"


def take_keys(parser: argparse.ArgumentParser) -> None:
    """Let a command take keys of a recipe."""
    parser.set_defaults(takes_changes=True)
    parser.epilog = (
        f"{parser.epilog} --- keys of a recipe can be given too: those that a .pth does not say (--vision.name"
        " eva_vit_g.pth --language.name facebook/opt-2.7b), or another value (--vision.image_size 364)"
    )


def add_model(parser: argparse.ArgumentParser, stage: str | None, needed: bool = True) -> None:
    about = f"of stage {stage}: {CHECKPOINT}" if stage else CHECKPOINT
    parser.add_argument("model", metavar="MODEL", nargs=None if needed else "?", help=about)
    take_keys(parser)
    parser.set_defaults(stage=stage)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the frozen parts (default: the recipe's)")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-beams", type=int, help="beam width; 1 is greedy (default: 5)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling instead of beam search")
    parser.add_argument("--temperature", type=float, help="of sampling (default: 1)")
    parser.add_argument("--length-penalty", type=float, help="below 0 favors short texts (default: 1, answers -1)")
    parser.add_argument("--max-new-tokens", type=int, help="longest text in tokens (default: 30, answers 10)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")


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
        say(f"{output / name}: {rows} rows")


def run_train(options: argparse.Namespace) -> None:
    from blip2.recipe import find_recipe, load_recipe, recipe_help

    if options.help:
        print(recipe_help())
        print(
            "\nRECIPE is a YAML file, or the name of one that comes with blip2. --resume goes on from the last"
            "\ncheckpoint of the run. Every key of a recipe can be overridden on the command line."
            "\n\nexample: blip2 train demo-stage1 --data.batch_size 32"
        )
        return
    if options.recipe is None:
        raise InputError("no recipe was given: blip2 train RECIPE; blip2 train --help lists what a recipe holds")
    recipe = load_recipe(find_recipe(options.recipe), options.rest)
    from blip2.evaluation.in_training import train

    say(train(recipe, resume=options.resume))


def run_features(options: argparse.Namespace) -> None:
    from blip2.recipe import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(options.recipe), options.rest)
    from blip2.training.features import make_features

    make_features_on(options, recipe)
    for line in make_features(recipe):
        say(line)


def run_caption(options: argparse.Namespace) -> None:
    model = _load(options)
    captions = model.caption(options.images, options.prompt, _decoding(options, questions=False))
    for image, caption in zip(options.images, captions, strict=True):
        say(*([image] if len(captions) > 1 else []), caption)


def run_ask(options: argparse.Namespace) -> None:
    model = _load(options)
    answers = model.answer(options.image, options.questions, _decoding(options, questions=True))
    for question, answer in zip(options.questions, answers, strict=True):
        say(*([question] if len(answers) > 1 else []), answer)


def run_match(options: argparse.Namespace) -> None:
    model = _load(options)
    matches = model.match(options.image, options.texts)[0].tolist()
    similarities = model.similarity(options.image, options.texts)[0].tolist()
    print("match\tsimilarity\ttext")
    for text, match, similarity in sorted(zip(options.texts, matches, similarities, strict=True), key=lambda r: -r[1]):
        say(f"{match:.3f}", f"{similarity:.3f}", text)


def run_embed(options: argparse.Namespace) -> None:
    if options.data is not None or options.engine == "ray":
        embed_corpus(options)
        return
    if not options.images and not options.text:
        raise InputError("nothing to embed: give image files, --text, or both; or a whole corpus with --data")
    from safetensors import SafetensorError

    from blip2.io import write_tensors

    if not Path(options.output).absolute().parent.is_dir():  # better said before the work than after
        raise InputError(f"there is no folder for {options.output}: make it, or give another --output")
    model = _load(options)
    out = {}
    if options.images:
        out["images"] = model.embed_images(options.images).cpu().contiguous()
    if options.text:
        out["texts"] = model.embed_texts(options.text).cpu().contiguous()
    names = {"images": json.dumps(options.images), "texts": json.dumps(options.text)}
    try:
        write_tensors(options.output, out, {key: names[key] for key in out})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{options.output} cannot be written ({error}): give another --output") from error
    say(", ".join(f"{key} {list(tensor.shape)}" for key, tensor in out.items()) + f" -> {options.output}")


def run_evaluate(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.predictions is None):
        raise InputError("expected a MODEL or --predictions, one of them: what is to be scored?")
    from blip2.config import EvaluationConfig
    from blip2.evaluation.run import DECODING, evaluate, evaluate_predictions, settings_of

    decoding = {name: getattr(options, name) for name in DECODING}
    config = EvaluationConfig(
        options.task, options.data, prompt=options.prompt, rerank_k=options.rerank_k, fusion=options.fusion,
        rules=options.rules, lemmatize=options.lemmatize, **decoding,
    )  # fmt: skip
    settings = settings_of(config, _seed(options))
    if options.predictions is not None:
        metrics = evaluate_predictions(
            options.predictions, options.task, options.data, options.output, settings, limit=options.limit
        )
    else:
        metrics = evaluate(
            options.model, options.task, options.data, options.output, settings, limit=options.limit,
            device=options.device, dtype=options.dtype, changes=options.changes,
        )  # fmt: skip
    print(json.dumps(metrics, indent=1))


def run_convert(options: argparse.Namespace) -> None:
    from blip2.convert import convert

    say(convert(options.source, options.target, options.to, options.changes, options.stage1, options.with_language))


def run_push(options: argparse.Namespace) -> None:
    from blip2.hub import push

    say(push(options.folder, options.repository, options.private))


def _load(options: argparse.Namespace):
    from blip2.pipelines import load

    # A checkpoint that holds both stages can be used as either; one that holds the other alone says so itself.
    return load(options.model, options.device, options.dtype, changes=options.changes, stage=options.stage)


def _decoding(options: argparse.Namespace, questions: bool):
    from transformers import set_seed

    from blip2.pipelines import ANSWER, CAPTION

    set_seed(_seed(options))
    given = {
        "num_beams": options.num_beams,
        "top_p": options.top_p,
        "temperature": options.temperature,
        "length_penalty": options.length_penalty,
        "max_new_tokens": options.max_new_tokens,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(ANSWER if questions else CAPTION, **changes)


def _seed(options: argparse.Namespace) -> int:
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}, expected 0 to {2**32 - 1}")
    return options.seed


if __name__ == "__main__":
    sys.exit(main())
