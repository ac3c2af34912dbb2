"""The commands of ``blip2``: one typed function each, from which :mod:`blip2.options` makes the command line.

Each function imports the modules that need PyTorch in its body, so that ``--help`` does not wait for PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from blip2.config import CheckpointFormat, DecodingOptions, EvaluationConfig, Precision, ScoreName, TemperatureName
from blip2.corpus.options import NUCLEUS_SAMPLING, CapFiltConfig, Check, Engine, Sharding
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, CHAT_DECODING, Decoding, Sampling
from blip2.errors import InputError, escape_control_characters
from blip2.search.options import SearchOptions, Vectors
from blip2.serve.options import ServeOptions


@dataclass(frozen=True)
class Device:
    """The device and the data type with which models run."""

    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1 or mps. null: a GPU if there is one."""
    dtype: Precision | None = None
    """Data type of the image encoder and the LLM. null: the dtype in the model's config; if the config sets none, bf16
    on a CUDA GPU and fp32 on other devices."""


@dataclass(frozen=True)
class Loading(Device):
    """Arguments of :func:`blip2.load`."""

    overrides: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadingStage1(Loading):
    """Arguments of :func:`blip2.load` for a stage-1 model, which has no LLM."""

    dtype: Precision | None = None
    """Data type of the image encoder. null: the dtype in the model's config; if the config sets none, bf16 on a CUDA
    GPU and fp32 on other devices."""


CAPFILT_DECODING = replace(NUCLEUS_SAMPLING.options, num_beams=None)
"""The default of ``blip2 capfilt``: nucleus sampling, unless the option ``--num-beams`` is given."""


def demo(*, quick: bool, output: Path = Path("runs/demo"), scale: float | None, data: str | None) -> None:
    """Train both stages on generated scenes and report what the models learned.

    The arguments are those of :func:`blip2.demo.run.demo`.

    Example:
        blip2 demo
    """
    from blip2.demo.run import demo

    if scale is not None and not 0 < scale <= 1000:
        raise InputError(f"--scale is {scale:g}, expected a number above 0 and at most 1000")
    demo(output, quick, data, scale)


def scenes(
    output: Path,
    *,
    seed: int,
    train: int,
    shards: int | None,
    kinds: list[str] | None,
    cutouts: Path | None,
) -> None:
    """Generate a data set of scenes with captions, questions and exact ground truth (docs/scenes.md).

    The arguments are those of :func:`blip2.data.scenes.make_scenes`.

    Example:
        blip2 scenes scenes-20000 --train 20000 --seed 1
    """
    from blip2.data.scenes import make_scenes

    made = make_scenes(output, seed, train=train, shards=shards, cutouts=cutouts, kinds=kinds)
    for name, rows in made.items():
        print_row(f"{output / name}: {rows} rows")


def train(recipe: str | None = None, *, resume: bool = False, keys: list[str]) -> None:
    """Train one stage with a recipe.

    Every key of a recipe can be overridden on the command line.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with blip2.
        resume: continue from the last checkpoint of the run in the folder that the recipe's output names.

    Example:
        blip2 train demo-stage1 --data.batch_size 32
    """
    from blip2.recipe import find_recipe, load_recipe

    if recipe is None:
        raise InputError(
            "no recipe was given, expected a YAML file or the name of a recipe: run blip2 train RECIPE, for example"
            " blip2 train demo-stage1"
        )
    loaded = load_recipe(find_recipe(recipe), keys)
    from blip2.evaluation.in_training import train

    print_row(train(loaded, resume=resume))


def features(recipe: str, *, engine: Engine, keys: list[str]) -> None:
    """Compute and cache the image features that a recipe trains on.

    The frozen image encoder encodes data.cached_views views of each image of data.train (one view if the recipe has
    data.cached_views 0), and the images of data.validation. A training run with data.cached_views above 0 reads the
    cached features. If the command is interrupted and started again, it encodes only the images whose features are
    missing. Under torchrun or accelerate launch, each process encodes a share of the images.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with blip2.

    Example:
        blip2 features demo-stage1 --data.cached_dtype int8
    """
    from blip2.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), keys)
    if engine.kind == "ray":
        from blip2.corpus.features import make_features_with_engine

        make_features_with_engine(engine, loaded)
    elif engine.num_threads is not None:
        raise InputError(
            "--num-threads needs --engine ray: leave --num-threads out, and set the environment variable"
            " OMP_NUM_THREADS if needed"
        )
    from blip2.training.features import make_features

    for line in make_features(loaded):
        print_row(line)


def caption(
    model: str,
    images: list[str],
    *,
    prompt: str | None = None,
    decoding: DecodingOptions = CAPTION_DECODING.options,
    sampling: Sampling,
    revision: str | None = None,
    loading: Loading,
) -> None:
    """Caption images.

    Args:
        model: stage-2 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        images: image files.
        prompt: text that each caption continues. null: the prompt with which the model was trained.
        revision: branch, tag or commit on the hub. null: the newest commit of the main branch.

    Example:
        blip2 caption runs/demo/stage2 cat.jpg
    """
    from blip2.pipelines import load

    pipeline = load(model, stage="generation", revision=revision, **vars(loading))
    captions = pipeline.caption(images, prompt, _seeded(decoding, sampling))
    for image, text in zip(images, captions, strict=True):
        print_row(*([image] if len(captions) > 1 else []), text)


def ask(
    model: str,
    image: str,
    questions: list[str],
    *,
    decoding: DecodingOptions = ANSWER_DECODING.options,
    sampling: Sampling,
    revision: str | None = None,
    loading: Loading,
) -> None:
    """Answer questions about an image.

    Args:
        model: stage-2 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        image: an image file.
        questions: one or more questions.
        revision: branch, tag or commit on the hub. null: the newest commit of the main branch.

    Example:
        blip2 ask runs/demo/vqa cat.jpg "What is it?"
    """
    from blip2.pipelines import load

    pipeline = load(model, stage="generation", revision=revision, **vars(loading))
    answers = pipeline.answer(image, questions, _seeded(decoding, sampling))
    for question, text in zip(questions, answers, strict=True):
        print_row(*([question] if len(answers) > 1 else []), text)


def chat(
    model: str,
    images: list[str],
    *,
    template: str | None = None,
    decoding: DecodingOptions = CHAT_DECODING.options,
    sampling: Sampling,
    revision: str | None = None,
    loading: Loading,
) -> None:
    """Talk about images: each line is a question, and its answer may refer to all previous questions and answers.

    Answers are shown as they are written. /image PATH adds an image to the next question, /reset forgets the
    conversation, /help shows all commands, /quit leaves, and Ctrl-C ends an answer. If the standard input is not a
    terminal, its lines are the questions, and each answer is printed as one line.

    Args:
        model: stage-2 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        images: image files to start the conversation with.
        template: prompt with {} in the place of each question, or chat for the chat template of the LLM. null: the
            prompt of questions with which the model was trained, or the paper's.
        revision: branch, tag or commit on the hub. null: the newest commit of the main branch.

    Example:
        blip2 chat runs/demo/vqa cat.jpg
    """
    from blip2.pipelines import load
    from blip2.pipelines.terminal import talk

    chosen = _seeded(decoding, sampling).without_beams()
    pipeline = load(model, stage="generation", revision=revision, **vars(loading))
    talk(pipeline.chat(images, template=template, decoding=chosen))


def match(model: str, image: str, texts: list[str], *, revision: str | None = None, loading: LoadingStage1) -> None:
    """Rank texts by how well they match an image.

    Each line shows the probability that the text matches the image (ITM), the cosine similarity (ITC) and the text.

    Args:
        model: stage-1 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        image: an image file.
        texts: texts to compare with the image.
        revision: branch, tag or commit on the hub. null: the newest commit of the main branch.

    Example:
        blip2 match runs/demo/stage1 cat.jpg "a cat" "a dog"
    """
    from blip2.pipelines import load

    pipeline = load(model, stage="representation", revision=revision, **vars(loading))
    matches = pipeline.match(image, texts)[0].tolist()
    similarities = pipeline.similarity(image, texts)[0].tolist()
    print("match\tsimilarity\ttext")
    for text, match, similarity in sorted(zip(texts, matches, similarities, strict=True), key=lambda row: -row[1]):
        print_row(f"{match:.3f}", f"{similarity:.3f}", text)


def embed(
    model: str,
    images: Sequence[str] = (),
    *,
    text: Sequence[str] = (),
    data: str | None = None,
    output: Path,
    sharding: Sharding,
    engine: Engine,
    loading: LoadingStage1,
) -> None:
    """Write the embeddings of images and texts to a file, or the embeddings of a corpus to a folder.

    Args:
        model: stage-1 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        images: image files.
        text: a text to embed. Repeat the option for several texts.
        data: a corpus to embed: any source that data.train of a recipe can name (docs/data.md).
        output: without --data, a .safetensors file for the tensors images (images x queries x width) and texts (texts x
            width); with --data, a folder.

    Example:
        blip2 embed runs/demo/stage1 *.jpg --output cats.safetensors
    """
    if data is None and engine.kind == "ray":
        raise InputError("--engine ray embeds a corpus, but no --data was given: add --data, or leave out --engine ray")
    if data is not None and (images or text):
        raise InputError(
            "found both --data, which embeds a corpus, and images or --text: leave out --data, or the images and --text"
        )
    from blip2.corpus.embed import embed, embed_corpus

    if data is None:
        tensors = embed(model, output, images, text, **vars(loading))
        print_row(", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) + f" -> {output}")
        return
    metrics = embed_corpus(model, data, output, shard_size=sharding.shard_size, engine=engine, **vars(loading))
    print(json.dumps({name: metrics[name] for name in ("images", "texts", "skipped")}, indent=1))


def index(
    model: str | None = None,
    data: str | None = None,
    *,
    output: str | None = None,
    vectors: Vectors | None,
    split: str,
    image_column: str | None,
    caption_column: str | None,
    check: str | None = None,
    loading: LoadingStage1,
) -> None:
    """Make a library of images that can be searched, or bring it up to date.

    The command embeds the images that are new or have changed, and deletes those that are gone. If it is interrupted
    and started again, it continues where it stopped.

    The arguments are those of :func:`blip2.search.indexing.index`.

    Args:
        model: stage-1 model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth
            file.
        check: measure the recall of the approximate search in this library against exact search, and change nothing.

    Example:
        blip2 index runs/demo/stage1 ~/photos --output library
    """
    if check is not None:
        if model or data or output:
            raise InputError("--check only measures a library: leave out MODEL, DATA and --output")
        from blip2.search.recall import measure_recall

        print(json.dumps(vars(measure_recall(check)), indent=1))
        return
    arguments = {"MODEL": model, "DATA": data, "--output": output}
    if model is None or data is None or output is None:
        missing = " and ".join(name for name, value in arguments.items() if value is None)
        raise InputError(f"no {missing} was given: run blip2 index MODEL DATA --output LIBRARY")
    from blip2.search.indexing import index

    columns = {"image_column": image_column, "caption_column": caption_column}
    report = index(model, data, output, vectors=vectors, split=split, **columns, **vars(loading))
    print(json.dumps(report.as_json(), indent=1))


def search(
    library: str, query: str, *, model: str | None = None, options: SearchOptions, loading: LoadingStage1
) -> None:
    """Search a library of images with words or with an image.

    Each line shows the probability that image and words match (ITM), the cosine similarity (ITC), the image, its first
    caption and its metadata.

    Args:
        library: folder of the library that blip2 index made, or its URI on object storage.
        query: words; or an image file, recognized by its suffix.
        model: the stage-1 model with which the library was made. null: the checkpoint that the library names.

    Example:
        blip2 search library "a red bus in the rain" --where "year >= 2020"
    """
    from blip2.io import resolve_target
    from blip2.search.library import Library
    from blip2.search.report import parse_query, write_page

    if options.html is not None:
        resolve_target(options.html)  # refuses a pipe before the search
    opened = Library.open(library, model, **vars(loading))
    parsed = parse_query(query)
    hits = opened.search(parsed, options.k, options.where, options.rerank_k)
    if options.html is not None:
        write_page(opened, parsed, hits, options.html)
    if options.as_json:
        print(json.dumps([hit.as_json() for hit in hits], indent=1))
        return
    print_row("match", "similarity", "image", "caption", "metadata")
    for hit in hits:
        match = "" if hit.match is None else f"{hit.match:.3f}"
        metadata = ", ".join(f"{name} {value}" for name, value in hit.metadata.items())
        more = f"{hit.image} (and {len(hit.duplicates)} with the same bytes)" if hit.duplicates else hit.image
        print_row(match, f"{hit.similarity:.3f}", more, "".join(hit.captions[:1]), metadata)
        if hit.problem:
            print_row("", "", f"not re-ranked: {hit.problem}")


def serve(models: list[str], *, library: str | None, options: ServeOptions, device: Device) -> None:
    """Answer requests over HTTP: OpenAI's chat and embeddings with images, re-ranking, image search, and a web page.

    The command ends on SIGTERM or Ctrl-C, after it has answered the requests that have begun.

    The arguments are those of :func:`blip2.serve.server.serve`.

    Example:
        blip2 serve runs/demo/vqa runs/demo/stage1 --library library
    """
    try:
        from blip2.serve.server import serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"the service needs {error.name}, which is not installed: pip install 'blip2[serve]'"
        ) from error
    serve(models, library, options, **vars(device))


def score(
    data: str,
    *,
    model: str,
    by: ScoreName = "itm",
    output: Path,
    prompt: str | None = None,
    sharding: Sharding,
    engine: Engine,
    loading: Loading,
) -> None:
    """Score the captions of a corpus: how well each caption fits its image (docs/scoring.md).

    The output folder has one JSONL file per shard, with the key of each image, its captions and their scores, so that
    the scores can be joined with the corpus and captions below a score can be left out. An interrupted run resumes.

    Args:
        data: the corpus: any source that data.train of a recipe can name (docs/data.md).
        model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth file; of stage 1
            for itc, itm and itg, of stage 2 for lm and pmi.
        by: the score. itc, the fastest, is the cosine of the embeddings. itm, slower and more accurate, is the
            probability of a match. itg and lm are the log-likelihood of the caption, under the Q-Former and under the
            LLM. pmi is lm minus the log-likelihood given a blank image, which corrects for common sentences.
        output: folder for the scores, metrics.json and skipped.jsonl, which names what could not be read.
        prompt: text that each caption continues, for lm and pmi. null: the prompt with which the model was trained.

    Example:
        blip2 score 'shards/{00000..00127}.tar' --model runs/mine/stage1 --by itm --output scores
    """
    from blip2.corpus.score import score_corpus

    metrics = score_corpus(
        model, data, output, by, prompt=prompt, shard_size=sharding.shard_size, engine=engine, **vars(loading)
    )
    print(json.dumps({name: metrics[name] for name in ("images", "texts", "mean_score", "skipped")}, indent=1))


def capfilt(
    captioner: str,
    ranker: str,
    *,
    data: str,
    output: Path,
    config: CapFiltConfig,
    decoding: DecodingOptions = CAPFILT_DECODING,
    check: Check,
    engine: Engine,
    device: Device,
) -> None:
    """Bootstrap the captions of a corpus: generate captions, rank them with the originals, keep the best.

    Captions are generated by nucleus sampling. If --num-beams is given, beam search is used instead of the default of
    --top-p.

    With --check, stage 1 is trained on the captions before and after the round, and the command fails if the new
    captions are worse on held-out pairs (docs/capfilt.md).

    The arguments are those of :func:`blip2.corpus.capfilt.capfilt`.

    Example:
        blip2 capfilt runs/mine/stage2 runs/mine/stage1 --data 'shards/{00000..00127}.tar' --output bootstrapped
    """
    from blip2.corpus.capfilt import capfilt

    if decoding.num_beams is not None and decoding.top_p == NUCLEUS_SAMPLING.top_p:
        decoding = replace(decoding, top_p=None)
    chosen = (NUCLEUS_SAMPLING if decoding.num_beams is None else Decoding()).override(decoding)
    config = replace(config, decoding=chosen)
    metrics = capfilt(captioner, ranker, data, output, config, engine=engine, check=check, **vars(device))
    shown = ("counts", "dropped", "skipped", "keep_rates", "mean_scores", "check")
    print(json.dumps({name: metrics[name] for name in shown if name in metrics}, indent=1))
    print(f"report: {output / 'report.html'}")
    if check.recipe is not None and not metrics["check"]["accepted"]:
        raise InputError(
            f"{metrics['check']['reason']}: train on {data}, or repeat the round with better models or stricter filters"
        )


def evaluate(
    model: str | None = None,
    *,
    predictions: str | None = None,
    config: EvaluationConfig,
    output: Path,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Evaluate a model, or a file of predictions, on captioning, VQA or retrieval.

    Args:
        model: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS .pth file.
        predictions: file of predictions to score instead of a MODEL (docs/evaluation.md).
        output: folder for metrics.json, predictions.json and report.html.

    Example:
        blip2 evaluate runs/mine/stage2 --task vqa --data vqav2:val:/data/coco --output runs/mine/vqav2
    """
    if (model is None) == (predictions is None):
        found = "both MODEL and" if model else "neither MODEL nor"
        raise InputError(f"found {found} --predictions, expected one of them: give the one to score")
    from blip2.evaluation.run import evaluate, evaluate_predictions

    if model is None:
        assert predictions is not None
        metrics = evaluate_predictions(predictions, config, output)
    else:
        metrics = evaluate(model, config, output, seed=sampling.seed, **vars(loading))
    print(json.dumps(metrics, indent=1))


def calibrate(
    model: str,
    data: str,
    *,
    by: list[TemperatureName] | None,
    answer_list: str | None,
    limit: int | None,
    rules: Literal["official", "lavis"] = "official",
    decoding: DecodingOptions = ANSWER_DECODING.options,
    loading: Loading,
) -> None:
    """Fit temperatures to held-out data, so that probabilities agree with how often the model is right.

    The temperatures are stored in the checkpoint, and change no text, no ranking and no accuracy: only the
    probabilities of ranked candidates, of matches and of answers (docs/calibration.md).

    The arguments are those of :func:`blip2.evaluation.temperatures.calibrate`.

    Example:
        blip2 calibrate runs/demo/vqa held_out_questions.jsonl --answer-list answers.txt
    """
    from blip2.evaluation.temperatures import calibrate

    chosen = Decoding().override(decoding)
    results = calibrate(
        model, data, by, answer_list=answer_list, limit=limit, rules=rules, decoding=chosen, **vars(loading)
    )
    print(json.dumps(results, indent=1))


def convert(
    source: str,
    target: str,
    *,
    to: CheckpointFormat,
    stage1: str | None,
    with_language: bool,
    revision: str | None,
    overrides: dict[str, object],
) -> None:
    """Convert a checkpoint to the format of transformers, vLLM, LAVIS or blip2.

    The arguments are those of :func:`blip2.convert.convert`.

    Example:
        blip2 convert runs/mine/stage2 mine --to transformers
    """
    from blip2.convert import convert

    print_row(convert(source, target, to, overrides, stage1, with_language, revision))


def push(folder: str, repo_id: str, *, private: bool) -> None:
    """Upload a converted model to the Hugging Face hub.

    The arguments are those of :func:`blip2.hub.push_to_hub`.

    Example:
        blip2 push mine my-name/my-model
    """
    from blip2.hub import push_to_hub

    print_row(push_to_hub(folder, repo_id, private))


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        demo, scenes, train, features, caption, ask, chat, match, embed, index, search, serve, score, capfilt, evaluate,
        calibrate, convert, push,
    )
}  # fmt: skip
"""The commands by name, in the order of ``blip2 --help``."""


def print_row(*cells: object) -> None:
    """Print cells separated by tabs, with control characters escaped."""
    print("\t".join(escape_control_characters(cell) for cell in cells))


def _seeded(options: DecodingOptions, sampling: Sampling) -> Decoding:
    """Seed all random number generators with ``sampling.seed``, and return the decoding with `options`."""
    from accelerate.utils import set_seed  # that of transformers also imports peft and bitsandbytes, which print

    set_seed(sampling.seed)
    return Decoding().override(options)
