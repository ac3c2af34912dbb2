"""Train both stages, fine-tune on questions, and evaluate on held-out images.

Stage 1 trains a Q-Former, initialized from MiniLM, on the features of EfficientNet-Lite0. Stage 2 connects the Q-Former
to SmolLM2-135M and trains on captions; the resulting model is then fine-tuned on questions as in §4.3 of the paper.
For comparison, as in Figure 5 of the paper, stage 2 is also trained without stage 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from blip2.config import DataConfig, Precision, Recipe
from blip2.data.assets import fetch
from blip2.data.images import preprocess, read_image
from blip2.data.records import Records
from blip2.data.sources import open_records
from blip2.decoding.search import Decoding
from blip2.demo.conversations import write_conversations
from blip2.demo.data import DemoData, scenes_data, user_data
from blip2.demo.report import (
    BLANK,
    CONVERSATIONS,
    MAJORITY,
    TWINS,
    VQA,
    WITHOUT_STAGE1,
    DemoResults,
    print_tables,
    write_demo_report,
)
from blip2.errors import InputError
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from blip2.evaluation.scenes import (
    majority_answers,
    matching_accuracy,
    read_rows,
    read_truths,
    score_answers,
    score_facts,
    score_twins,
)
from blip2.io import read_json, write_json
from blip2.model.losses import query_statistics
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.recipe import find_recipe, load_recipe
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train

log = logging.getLogger("blip2")

GREEDY = Decoding(num_beams=1, max_new_tokens=24)
GREEDY_ANSWER = Decoding(num_beams=1, max_new_tokens=4)
RERANK_K = 16
"""Number of candidates that the matching head re-ranks in each direction."""
EVAL_SIZES = {"compositions": (160, 300), "images": (80, 100), "cutouts": (80, 100)}
"""For each test split, the numbers of images and questions that are evaluated: the first ones in the files."""
NUM_CONVERSATIONS = 4
"""Number of scenes about which the page of conversations has a conversation."""
PLAN = "plan.json"
BATCH_SIZE = 48
"""Number of texts that are generated in one batch."""


@dataclass(frozen=True)
class Run:
    """One training run of the demo."""

    recipe: str
    folder: str
    start_from: tuple[str, ...] = ()
    """Names of the runs whose weights initialize this run. A weight that several of these runs have is taken from the
    first."""


RUNS = {
    "stage 1": Run("demo-stage1", "stage1"),
    TWINS: Run("demo-twins", "twins", ("stage 1",)),
    "stage 2": Run("demo-stage2", "stage2", (TWINS,)),
    VQA: Run("demo-vqa", "vqa", ("stage 2", TWINS)),
    WITHOUT_STAGE1: Run("demo-stage2", "stage2-without-stage1"),
}
"""The runs by name, in the order of training. The runs on near twins and on questions are left out if there are no such
data; runs that would start from the former then start from stage 1."""


@dataclass
class StageTimer:
    """Durations of the parts of the demo, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        log.info("-- %s", part)
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started


@dataclass(frozen=True)
class DemoPlan:
    """Settings that depend on the speed of the machine."""

    precision: Precision
    scale: float
    """Factor by which the numbers of training steps in the recipes are multiplied."""
    quick: bool = False
    """Whether it is the short version."""
    data: str | None = None
    """:attr:`~blip2.demo.data.DemoData.digest` of the data."""


def make_plan(output: Path, scale: float | None = None, quick: bool = False, data: str | None = None) -> DemoPlan:
    """Return the plan of the interrupted demo in `output`, or else make and save a new plan.

    Args:
        output: folder of the demo.
        scale: factor for the number of training steps. None: the factor of the saved plan, or 1 in a new plan.
        quick: see :class:`DemoPlan`.
        data: see :class:`DemoPlan`.

    Raises:
        InputError: the saved plan cannot be read, or `output` contains a run with another plan. A run that is finished
            would be taken for a run on other data or with another number of steps, and the runs that start from it
            would not start again.
    """
    path = output / PLAN
    if path.is_file():
        try:
            saved = DemoPlan(**read_json(path))
        except TypeError as error:
            raise InputError(
                f"{path} is not the plan of a demo, which is an object with the keys precision and scale: delete this"
                " file, or give another output"
            ) from error
        plan = replace(saved, scale=saved.scale if scale is None else scale, quick=quick, data=data)
        changed = [key for key, value in asdict(plan).items() if value != getattr(saved, key)]
        if not changed:
            return saved
        if any((output / run.folder).exists() for run in RUNS.values()):
            key = changed[0]
            raise InputError(
                f"{output} contains a demo whose {key} is {getattr(saved, key)} instead of {getattr(plan, key)}: give"
                f" another --output, or delete {output}"
            )
    else:
        plan = DemoPlan(faster_precision(), 1.0 if scale is None else scale, quick, data)
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(plan))
    return plan


def demo(output: Path, quick: bool = False, data: str | None = None, scale: float | None = None) -> dict[str, Any]:
    """Train the models of the demo, evaluate them, print the results, and write ``metrics.json`` and ``report.html``.

    A demo that was interrupted resumes where it stopped if it is run again with the same `output`.

    Args:
        output: folder of the runs and the results.
        quick: run a short version, which takes two to three minutes.
        data: your own images with captions, to train on instead of the scenes: a folder of images with a .txt file for
            each image, or a table with the paths of the images.
        scale: factor by which the numbers of training steps in the recipes are multiplied. None: that of the
            interrupted demo in `output`, or 1.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: a package is not installed or cannot be downloaded, `data` cannot be used, or `output` contains runs
            that cannot be resumed, such as those of other data or with another `quick` or `scale`.
    """
    new_figure(1.0, 1.0)  # fails early if matplotlib is not installed
    for name in ("efficientnet-lite0", "minilm", "smollm2-135m-instruct"):
        fetch(name)
    demo_data = scenes_data(output, quick) if data is None else user_data(data, output)
    timer = StageTimer()
    plan = make_plan(output, scale, quick, demo_data.digest)
    log.info("training in %s, with %g times the number of steps in the recipes", plan.precision, plan.scale)
    recipes = demo_recipes(output, demo_data, plan, quick)
    for name, recipe in recipes.items():
        with timer.measure(f"training {name}"):
            train(recipe, resume=True)
    evaluator = Evaluator(recipes, timer, quick)
    metrics: dict[str, Any] = {"quick": quick}
    scenes = None
    if demo_data.scenes is not None:
        metrics["scenes"], scenes = evaluator.scenes(demo_data.scenes)
    images = None
    if demo_data.held_out is not None:
        metrics["images"], images = evaluator.images(demo_data.held_out)
    generators = evaluator.generators
    with timer.measure("conversations"):
        count = 1 if quick else NUM_CONVERSATIONS
        write_conversations(output / CONVERSATIONS, generators["stage 2"], generators.get(VQA), scenes, images, count)
    metrics |= {"seconds": sum(timer.seconds.values()), "seconds_by_part": timer.seconds}
    for name, recipe in recipes.items():
        rows = [row for row in read_metrics(Path(recipe.output)) if "validation_loss" in row]
        metrics[name] = {key: value for key, value in rows[-1].items() if key.startswith("validation_")}
    write_json(output / "metrics.json", metrics, indent=2)
    write_demo_report(output / "report.html", metrics, recipes, demo_data, evaluator.representation, scenes, images)
    print_tables(metrics, output)
    return metrics


def demo_recipes(output: Path, demo_data: DemoData, plan: DemoPlan, quick: bool) -> dict[str, Recipe]:
    """Return the recipes of :data:`RUNS` by name, without those for which `demo_data` has no data.

    Args:
        output: folder of the demo, in which each run gets a folder.
        demo_data: the data sources.
        plan: the precision and the factor for the number of training steps.
        quick: train each model for six steps.
    """
    sources = {
        VQA: (demo_data.questions, demo_data.questions_validation),
        TWINS: (demo_data.twins, demo_data.validation),
    }
    recipes: dict[str, Recipe] = {}
    for name, run in RUNS.items():
        source, validation = sources.get(name, (demo_data.train, demo_data.validation))
        if source is None:
            continue
        recipe = load_recipe(find_recipe(run.recipe))
        data = replace(recipe.data, train=source, validation=validation)
        if demo_data.scenes is None:  # random crops could contradict the captions of scenes
            data = replace(data, cached_views=4)
        steps = 6 if quick else max(1, round(plan.scale * recipe.training.max_steps))
        recipes[name] = replace(
            in_precision(recipe, plan.precision, steps),
            output=str(output / run.folder),
            start_from=[recipes.get(each, recipes["stage 1"]).output for each in run.start_from] or None,
            data=data,
        )
    return recipes


def in_precision(recipe: Recipe, precision: Precision, steps: int | None = None) -> Recipe:
    """Return a copy of a recipe that trains in `precision` and also loads the frozen models in `precision`.

    Args:
        steps: the number of training steps; None: that of the recipe.
    """
    return replace(
        recipe,
        vision=replace(recipe.vision, dtype=precision),
        language=recipe.language and replace(recipe.language, dtype=precision),
        training=replace(recipe.training, precision=precision, max_steps=steps or recipe.training.max_steps),
    )


def faster_precision() -> Precision:
    """Return the precision in which this machine multiplies matrices faster; always bf16 on a GPU.

    The matrices have the shapes of those in SmolLM2's MLP.
    """
    if torch.cuda.is_available():
        return "bf16"
    dtypes: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
    matrices = {
        name: (torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)) for name, dtype in dtypes.items()
    }

    def seconds(name: Precision) -> float:
        started = time.perf_counter()
        torch.mm(*matrices[name])
        return time.perf_counter() - started

    # The minimum over alternating rounds is robust against other load on the machine. Where bf16 is emulated, one round
    # takes a second, and the answer is clear after a few.
    rounds = []
    started = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) < 20 and time.perf_counter() - started < 1):
        rounds.append({name: seconds(name) for name in dtypes})
    return min(dtypes, key=lambda name: min(each[name] for each in rounds))


class Evaluator:
    """Evaluates the trained models on held-out images."""

    def __init__(self, recipes: dict[str, Recipe], timer: StageTimer, quick: bool) -> None:
        self.timer, self.quick = timer, quick
        pipeline = load(recipes.get(TWINS, recipes["stage 1"]).output)
        assert isinstance(pipeline, RepresentationPipeline)
        self.representation = pipeline
        # Decoding token by token is fastest in fp32 on CPUs, whatever the precision of training.
        dtype = None if torch.cuda.is_available() else "fp32"
        self.generators: dict[str, GenerationPipeline] = {}
        for name, recipe in recipes.items():
            if recipe.stage != "generation":
                continue
            pipeline = load(recipe.output, dtype=dtype)
            assert isinstance(pipeline, GenerationPipeline)
            pipeline.batch_size = BATCH_SIZE
            self.generators[name] = pipeline

    def encode(self, images: Sequence[Image.Image]) -> Float[Tensor, "I P E"]:
        """Encode images. All models can use the features, because they have the same image encoder."""
        pipeline = self.generators["stage 2"]
        return pipeline.encode_pixels(
            torch.stack([preprocess(image, pipeline.model.vision.preprocessing) for image in images])
        )

    def images(self, path: Path) -> tuple[dict[str, Any], DemoResults]:
        """Evaluate retrieval and captions on held-out images with captions.

        Args:
            path: JSONL file of the images and captions.

        Returns:
            The numbers for ``metrics.json``, and the outputs of the models for the report.
        """
        held_out = open_records(str(path), DataConfig(train=str(path)))
        assert isinstance(held_out, Records)
        records = list(held_out)[: 24 if self.quick else None]
        features = self.encode([read_image(record.image or b"") for record in records])
        references = [record.captions[0] for record in records]
        with self.timer.measure(f"retrieval and captions of {len(records)} images of {path.stem}"):
            retrieval = self._retrieve(features, references)
            names = ("stage 2", WITHOUT_STAGE1)
            captions = {name: self.generators[name].caption(features, decoding=GREEDY) for name in names}
        numbers = {
            "source": path.stem,
            "count": len(records),
            "retrieval": _recalls(retrieval),
            "captions": {name: score_captions(texts, references) for name, texts in captions.items()},
        }
        return numbers, DemoResults(records, features, captions, retrieval)

    def scenes(self, folder: Path) -> tuple[dict[str, Any], DemoResults]:
        """Evaluate the models on scenes.

        Captions and answers are evaluated on all three test splits; retrieval, matching and twins (pairs of scenes that
        differ in one fact) on held-out compositions only.

        Args:
            folder: folder of the scenes data set.

        Returns:
            The numbers for ``metrics.json``, and the outputs of the models for the report.
        """
        numbers: dict[str, dict[str, Any]] = {}
        numbers["compositions"], results = self._captions_and_answers(folder, "compositions")
        features = results.features
        with self.timer.measure("retrieval, matching and twins"):
            texts = [row["captions"][0] for row in results.rows]
            results.retrieval = self._retrieve(features, texts)
            numbers["compositions"] |= {
                "retrieval": _recalls(results.retrieval),
                "itm_accuracy": matching_accuracy(self.representation, features, texts),
                "queries": self._queries(features),
            }
            numbers["compositions"]["twins"], results.twins, results.twin_rows = self._twins(folder)
        for split in ("images", "cutouts"):
            numbers[split] = self._captions_and_answers(folder, split)[0]
        return numbers, results

    def _captions_and_answers(self, folder: Path, split: str) -> tuple[dict[str, Any], DemoResults]:
        """Evaluate captions and answers on a test split; on the split ``compositions``, also those of the baselines."""
        num_images, num_questions = EVAL_SIZES[split]
        rows = read_rows(folder / f"test_{split}.jsonl")[: 16 if self.quick else num_images]
        features = self.encode([read_image(folder / row["image"]) for row in rows])
        index = {row["image"]: i for i, row in enumerate(rows)}
        questions = [row for row in read_rows(folder / f"test_{split}_questions.jsonl") if row["image"] in index]
        questions = questions[:num_questions]
        image_index = [index[row["image"]] for row in questions]
        captions, answers = {}, {}
        with self.timer.measure(f"captions of {len(rows)} held-out {split}"):
            captions["stage 2"] = self.generators["stage 2"].caption(features, decoding=GREEDY)
            if split == "compositions":
                captions[WITHOUT_STAGE1] = self.generators[WITHOUT_STAGE1].caption(features, decoding=GREEDY)
        with self.timer.measure(f"{len(questions)} questions about held-out {split}"):
            answers[VQA] = self._answer(features, questions, image_index)
            if split == "compositions":
                blank = self.encode([Image.new("RGB", (224, 224), "gray")])
                captions[BLANK] = self.generators["stage 2"].caption(blank, decoding=GREEDY) * len(rows)
                answers[BLANK] = self._answer(blank, questions, [0] * len(questions))
                answers[MAJORITY] = majority_answers(read_rows(folder / "train_questions.jsonl"), questions)
        numbers = {
            "count": len(rows),
            "questions": len(questions),
            "captions": {name: score_facts(texts, read_truths(rows)) for name, texts in captions.items()},
            "answers": {name: score_answers(texts, questions) for name, texts in answers.items()},
        }
        results = DemoResults([], features, captions, folder=folder, rows=rows)
        if split == "compositions":
            results.questions = self._probabilities(features, questions, image_index, answers[VQA])
        return numbers, results

    def _retrieve(self, features: Float[Tensor, "I P E"], texts: list[str]) -> RetrievalResult:
        positive = torch.tensor([[a == b for b in texts] for a in texts])
        return evaluate_retrieval(self.representation, features, texts, positive, RERANK_K, "itm+itc/temperature")

    def _answer(
        self, features: Float[Tensor, "I P E"], rows: list[dict[str, Any]], image_index: list[int]
    ) -> list[str]:
        pipeline = self.generators[VQA]
        questions = [row["question"] for row in rows]
        prompts = pipeline.format_questions(questions)
        return pipeline.generate(features, prompts, GREEDY_ANSWER, image_index=image_index, questions=questions)

    def _probabilities(
        self,
        features: Float[Tensor, "I P E"],
        rows: list[dict[str, Any]],
        image_index: list[int],
        answers: list[str],
    ) -> dict[int, list[tuple[str, str, str, float]]]:
        """Return :attr:`DemoResults.questions`: up to four questions about each of the first 24 images."""
        pipeline = self.generators[VQA]
        chosen = [i for i, image in enumerate(image_index) if image < 24 and image_index[:i].count(image) < 4]
        questions, texts = [rows[i]["question"] for i in chosen], [answers[i] for i in chosen]
        prompts, images = pipeline.format_questions(questions), [image_index[i] for i in chosen]
        probabilities = pipeline.log_likelihood(features, prompts, texts, images, questions).exp().tolist()
        out: dict[int, list[tuple[str, str, str, float]]] = {}
        for i, answer, probability in zip(chosen, texts, probabilities, strict=True):
            row = rows[i]
            out.setdefault(image_index[i], []).append((row["question"], answer, row["answers"][0], probability))
        return out

    def _twins(self, folder: Path) -> tuple[dict[str, Any], dict[str, Float[Tensor, "N 2 2"]], list[dict[str, Any]]]:
        rows = read_rows(folder / "twins.jsonl")[: 16 if self.quick else None]
        features = self.encode([read_image(folder / row["image"]) for row in rows])
        twins = score_twins(self.representation, features, [row["captions"][0] for row in rows])
        types = [row["twin_type"] for row in rows[::2]]
        numbers: dict[str, Any] = {"count": len(types)}
        for name, each in twins.items():
            by_type = {kind: some.accuracy for kind, some in each.by_type(types).items()}
            numbers[name] = {"all": each.accuracy, **by_type}
        return numbers, {name: each.scores for name, each in twins.items()}, rows

    @torch.no_grad()
    def _queries(self, features: Float[Tensor, "I P E"]) -> dict[str, float]:
        """Return the mean cosine similarity between the output queries of an image, by model.

        The model for questions is left out, because its queries also depend on a question.
        """
        features = features[:64]
        model = self.representation.model
        z = {"stage 1": model.qformer(model.build_image_memory(features)).queries}
        z |= {name: pipeline.model.query_outputs(features) for name, pipeline in self.generators.items() if name != VQA}
        return {name: float(query_statistics(each)["query_similarity"]) for name, each in z.items()}


def _recalls(retrieval: RetrievalResult) -> dict[str, Any]:
    itc = retrieval.itc
    assert itc is not None
    return {
        "itc": {"image_to_text": itc.image_to_text, "text_to_image": itc.text_to_image},
        "reranked": {"image_to_text": retrieval.image_to_text, "text_to_image": retrieval.text_to_image},
        "chance": retrieval.chance,
    }
