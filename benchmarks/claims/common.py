"""What the scripts of the claims share.

Results that are computed once, recipes, runs of stage 1 that several claims begin with, a training loop for models that
no recipe describes, held-out scores, tables and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2.config import OptimizerConfig, Recipe
from blip2.data.assets import fetch
from blip2.data.images import read_image
from blip2.demo.run import faster_precision, in_precision
from blip2.evaluation.in_training import train
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import RetrievalResult
from blip2.evaluation.scenes import majority_answers, read_rows, score_answers
from blip2.io import write_json
from blip2.memory import tune_malloc
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.recipe import dump_config, find_recipe, load_recipe
from blip2.training.optimizer import build_optimizer, configure_trainable, update_learning_rate
from blip2.training.trainer import derive_seed

SCENES = "scenes-pairs"
STAGE1_STEPS = 200
"""Steps of the runs of stage 1 that several claims begin with."""
QUICK_ROWS = 24
"""Number of rows of a table with --quick."""
SAVE_STEPS = 25
"""Number of steps between the checkpoints of :func:`fit`."""
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Scores by variant, seed and name of the score."""


def once(path: Path, work: Callable[[], Any]) -> Any:
    """Return the result of some work, which is stored in a JSON file with the seconds that it took."""
    if not path.is_file():
        started = time.monotonic()
        result = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": round(time.monotonic() - started, 1), "result": result})
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def is_same_plan(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the results in a folder, if there are any, were computed with the same settings, recipes and
    scenes."""
    stages = ("stage1", "twins", "stage2", "vqa")
    recipes = {stage: dump_config(load_recipe(find_recipe(f"demo-{stage}"))) for stage in stages}
    plan = {**settings, "scenes": fetch(SCENES).name, "recipes": recipes}
    return once(folder / "done" / "plan.json", lambda: plan) == plan


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table, and return its path. A kill leaves no part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105
    return str(path)


def learn(recipe: Recipe) -> Path:
    """Train a recipe, or continue its training, and return the folder of its run."""
    run = Path(recipe.output)
    once(run.parents[1] / "done" / f"train-{run.name}.json", lambda: str(train(recipe, resume=True)))
    return run


def seconds(folder: Path) -> float:
    """Return the seconds of all stored work in a folder. A part that was interrupted counts from its last start."""
    stored = (json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.json"))
    return sum(each["seconds"] for each in stored if isinstance(each, dict) and "result" in each)


def demo_recipe(stage: str, folder: Path, features: Path, seed: int, steps: int, train: str) -> Recipe:
    """Return a recipe of the demo for a run of a claim: no validation, and features in a folder that runs share."""
    # Two precisions may be equally fast, but all runs that are compared have the same one, also after a kill.
    precision = once(features.parent / "precision.json", faster_precision)
    recipe = in_precision(load_recipe(find_recipe(f"demo-{stage}")), precision, steps)
    return replace(
        recipe,
        output=str(folder),
        data=replace(recipe.data, train=train, validation=None, features=str(features), streaming=False),
        training=replace(recipe.training, seed=seed, save_steps=25),
        optimizer=replace(recipe.optimizer, warmup_steps=min(recipe.optimizer.warmup_steps, max(1, steps // 10))),
    )


def load_stage1(run: str | Path) -> RepresentationPipeline:
    """Load a model of stage 1."""
    pipeline = load(run, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    return pipeline


def load_stage2(run: str | Path) -> GenerationPipeline:
    """Load a model of stage 2."""
    pipeline = load(run, stage="generation")
    assert isinstance(pipeline, GenerationPipeline)
    return pipeline


def read_images(
    pipeline: RepresentationPipeline | GenerationPipeline, file: str, limit: int
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Return the first rows of a file of the scenes, and the features of their images."""
    folder = fetch(SCENES)
    rows = read_rows(folder / file)[:limit]
    return rows, pipeline.encode_images([read_image(folder / row["image"]) for row in rows])


@cache
def read_features(run: Path, file: str, limit: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Return what :func:`read_images` returns with the image encoder of a run of stage 1, and keep it in memory."""
    return read_images(load_stage1(run), file, limit)


def read_questions(pipeline: GenerationPipeline, limit: int) -> tuple[list[dict[str, Any]], torch.Tensor, list[int]]:
    """Return the first questions about held-out compositions, the features of their images, and the image of each."""
    folder = fetch(SCENES)
    rows = read_rows(folder / "test_compositions_questions.jsonl")[:limit]
    names = list(dict.fromkeys(row["image"] for row in rows))
    features = pipeline.encode_images([read_image(folder / name) for name in names])
    return rows, features, [names.index(row["image"]) for row in rows]


def score_blind_answers(limit: int) -> dict[str, float]:
    """Return the shares of questions that the most frequent answers of the training data answer, without an image."""
    folder = fetch(SCENES)
    rows = read_rows(folder / "test_compositions_questions.jsonl")[:limit]
    return score_answers(majority_answers(read_rows(folder / "train_questions.jsonl"), rows), rows)


def recall_at_1(result: RetrievalResult) -> float:
    """Return the recall at 1, averaged over both directions, in [0, 1]."""
    return (result.image_to_text["r1"] + result.text_to_image["r1"]) / 2


def same_text(texts: Sequence[str]) -> torch.Tensor:
    """Return which texts are right for which images [I, T], where the text of an image may also be that of another."""
    return torch.tensor([[a == b for b in texts] for a in texts])


def mean_spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Format the mean, and the standard deviation if there are several values."""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose first column is text."""
    lines = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# -- one script --------------------------------------------------------------------------------------------------------


def make_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options that the scripts have in common; `output` is the name of the default folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/claims") / output)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all numbers of steps (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps and images, which show nothing")
    return parser


@dataclass(frozen=True)
class Claim:
    """One claim: its output folder, its seeds and its size.

    Runs of stage 1 and cached features are in the folder ``shared`` beside the output folder, or ``shared-quick``, so
    that several claims have them in common.
    """

    output: Path
    seeds: Sequence[int]
    scale: float
    quick: bool

    @classmethod
    def start(cls, parser: argparse.ArgumentParser, options: argparse.Namespace, **settings: Any) -> Claim:
        """Make the claim of the options. Another run in the output folder is an error.

        Args:
            parser: the result of :func:`make_parser`, which reports errors.
            options: the parsed options.
            settings: whatever else the results depend on.
        """
        if options.scale <= 0:
            parser.error(f"--scale is {options.scale:g}, expected a number above 0")
        tune_malloc()
        claim = cls(options.output, options.seeds, options.scale, options.quick)
        plans = ((claim.output, {"scale": claim.scale, "quick": claim.quick, **settings}), (claim.shared, {}))
        for folder, plan in plans:
            if not is_same_plan(folder, plan):
                parser.error(
                    f"{folder} has other results, of other options, recipes or scenes: give an --output in another"
                    " folder"
                )
        return claim

    @property
    def shared(self) -> Path:
        return self.output.parent / ("shared-quick" if self.quick else "shared")

    def steps(self, number: int) -> int:
        """Return a number of steps, multiplied by the scale."""
        return 2 if self.quick else max(1, round(self.scale * number))

    def limit(self, number: int) -> int:
        """Return a number of held-out records."""
        return 8 if self.quick else number

    def source(self, file: str) -> str:
        """Return the path of a table of the scenes; with --quick, of its first rows."""
        scenes = fetch(SCENES)
        if not self.quick:
            return str(scenes / file)
        rows = [{**row, "image": str(scenes / row["image"])} for row in read_rows(scenes / file)[:QUICK_ROWS]]
        return write_rows(self.shared / "tables" / file, rows)

    def recipe(self, stage: str, name: str, seed: int, steps: int, train: str = "train.jsonl") -> Recipe:
        """Return the recipe ``demo-{stage}`` for the run `name` of this claim; see :func:`demo_recipe`."""
        folder = self.output / "runs" / name
        return demo_recipe(stage, folder, self.shared / "features", seed, self.steps(steps), self.source(train))

    def stage1(self, seed: int) -> Path:
        """Train stage 1 of the demo's recipe for all claims, and return the folder of its run."""
        recipe = self.recipe("stage1", "", seed, STAGE1_STEPS)
        name = f"stage1-{recipe.training.max_steps}-{seed}"
        return learn(replace(recipe, output=str(self.shared / "runs" / name)))

    def images(self, file: str, limit: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Return the first rows of a table of the scenes, and the features of their images in the demo's encoder."""
        return read_features(self.stage1(self.seeds[0]), file, limit)

    def compare(self, variants: Sequence[str], measure: Callable[[str, int], dict[str, Any]]) -> dict[str, Any]:
        """Return what `measure` returns for a variant and a seed, by variant and seed. It is called once for each."""
        found: dict[str, dict[str, Any]] = {variant: {} for variant in variants}
        for seed in self.seeds:
            for variant in variants:

                def work(variant: str = variant, seed: int = seed) -> dict[str, Any]:
                    return measure(variant, seed)

                name = f"scores-{variant.replace(' ', '-')}-{seed}.json"
                found[variant][str(seed)] = once(self.output / "done" / name, work)
        return found

    def finish(self, results: Mapping[str, Any], text: str, figure: Any) -> None:
        """Write the raw numbers, the table and the figure, and print the table."""
        name = self.output.name
        times = {"seconds": seconds(self.output / "done"), "seconds_of_shared_models": seconds(self.shared / "done")}
        write_json(self.output / "results.json", {"scale": self.scale, "quick": self.quick, **results, **times})
        (self.output / "table.md").write_text(text + "\n", encoding="utf-8")
        figure.savefig(self.output / f"{name}.png", dpi=110)
        print(text)


# -- models that no recipe describes -----------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    optimizer_config: OptimizerConfig,
    steps: int,
    seed: int,
    loss_of: Callable[[int], torch.Tensor],
    state: Path,
) -> None:
    """Train a model with the optimizer of a recipe. A run that was killed continues from its last state.

    Args:
        model: the model. Names of parameters are matched with the patterns of the recipe.
        optimizer_config: rates, warm-up and decay.
        steps: number of steps.
        seed: seed of what is random within a step.
        loss_of: returns the loss of a step. The data of a step may depend on its number alone.
        state: file of the weights that train, with the state of the optimizer.
    """
    rates = configure_trainable(model, optimizer_config)
    model.train()
    optimizer = build_optimizer(model, rates, optimizer_config)
    trained = {name: parameter for name, parameter in model.named_parameters() if name in rates}
    device, first = next(iter(trained.values())).device, 0
    if state.is_file():
        saved = torch.load(state, weights_only=True, map_location=device)
        first = saved["step"]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["weights"][name])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, steps):
        torch.manual_seed(derive_seed(seed, step, 0))
        update_learning_rate(optimizer, step, steps, optimizer_config)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(step)
        loss.backward()
        if optimizer_config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained.values(), optimizer_config.max_grad_norm)
        optimizer.step()
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            state.parent.mkdir(parents=True, exist_ok=True)
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            temporary = state.with_suffix(".tmp")
            torch.save({"step": step + 1, "weights": weights, "optimizer": optimizer.state_dict()}, temporary)
            os.replace(temporary, state)  # noqa: PTH105
    model.eval()


# -- output ------------------------------------------------------------------------------------------------------------


def score_table(title: str, scores: Scores, titles: Mapping[str, str]) -> str:
    """Return scores as a table in Markdown: a row for each variant, in percent, the mean and spread over the seeds.

    Args:
        title: title of the column of the variants.
        scores: the scores, as shares in [0, 1].
        titles: titles of the columns by the name of the score.
    """
    rows = [
        [variant, *(mean_spread([each[key] for each in by_seed.values()]) for key in titles)]
        for variant, by_seed in scores.items()
    ]
    return markdown([title, *titles.values()], rows)


def draw_scores(scores: Scores, titles: Mapping[str, str]) -> Any:
    """Return a figure with a panel for each score, a point for each seed and a line at the mean of each variant."""
    figure = new_figure(3.2 * len(titles), 3.2)
    for number, (key, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, len(titles), number)
        for place, by_seed in enumerate(scores.values()):
            values = [100 * each[key] for each in by_seed.values()]
            axes.plot([place] * len(values), values, "o", color=f"C{place}", markersize=4)
            axes.plot([place - 0.25, place + 0.25], [statistics.mean(values)] * 2, color=f"C{place}", linewidth=2)
        axes.set_xticks(range(len(scores)), list(scores), fontsize=7, rotation=20)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    return figure


def draw_curves(
    curves: Mapping[str, Mapping[str, Mapping[str, float]]],
    labels: tuple[str, str],
    levels: Mapping[str, float] | None = None,
) -> Any:
    """Return a figure with a line for each variant: the mean over the seeds, and a point for each seed.

    Args:
        curves: shares in [0, 1] by variant, seed and the position on the x axis.
        labels: labels of the axes.
        levels: shares that are drawn as dashed horizontal lines, by label.
    """
    figure = new_figure(5.0, 3.2)
    axes = figure.add_subplot(1, 1, 1)
    for color, (variant, by_seed) in enumerate(curves.items()):
        runs = list(by_seed.values())
        places = list(runs[0])
        means = [100 * statistics.mean(run[place] for run in runs) for place in places]
        axes.plot([float(place) for place in places], means, color=f"C{color}", label=variant)
        for run in runs:
            axes.plot([float(place) for place in places], [100 * run[place] for place in places], "o",
                      color=f"C{color}", markersize=3)  # fmt: skip
    for number, (label, share) in enumerate((levels or {}).items()):
        axes.axhline(100 * share, color="gray", linestyle=("--", ":")[number % 2], linewidth=1, label=label)
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
