"""What the scripts of the claims share: results that are computed once, means with spreads, and held-out scores."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip2.config import Recipe
from blip2.data.assets import fetch
from blip2.data.images import read_image
from blip2.demo.run import faster_precision, in_precision
from blip2.evaluation.retrieval import RetrievalResult
from blip2.evaluation.scenes import read_rows
from blip2.io import write_json
from blip2.pipelines import RepresentationPipeline, load
from blip2.recipe import find_recipe, load_recipe

SCENES = "scenes-pairs"


def once(path: Path, work: Callable[[], Any]) -> Any:
    """Return the result of some work, which is stored in a JSON file with the seconds that it took."""
    if not path.is_file():
        started = time.monotonic()
        result = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": round(time.monotonic() - started, 1), "result": result})
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def seconds(folder: Path) -> float:
    """Return the seconds of all stored work in a folder. A part that was interrupted counts from its last start."""
    stored = (json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.json"))
    return sum(each["seconds"] for each in stored if isinstance(each, dict) and "result" in each)


def demo_recipe(stage: str, folder: Path, features: Path, seed: int, steps: int, train: str) -> Recipe:
    """Return a recipe of the demo for a run of a claim: no validation, and features in a folder that runs share."""
    recipe = in_precision(load_recipe(find_recipe(f"demo-{stage}")), faster_precision(), steps)
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


def read_images(pipeline: RepresentationPipeline, file: str, limit: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Return the first rows of a file of the scenes, and the features of their images."""
    folder = fetch(SCENES)
    rows = read_rows(folder / file)[:limit]
    return rows, pipeline.encode_images([read_image(folder / row["image"]) for row in rows])


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
