"""Queries that differ: what keeps them apart, and what that gives (docs/queries.md).

    python benchmarks/queries.py --output runs/queries                  # every variant, three seeds
    python benchmarks/queries.py --variants none recipe --seeds 0       # two variants, one seed
    python benchmarks/queries.py --table                                # what is there, as a table and a figure

Each variant trains stage 1 and stage 2 of the demo's recipes on scenes, from the same seeds, and is measured on
held-out compositions: the cosine of an image's queries after every block, the held-out losses, and the facts in
captions. A run that was killed continues; what is done is not done again. Results go to ``results.json`` and
``queries.png`` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.config import Recipe
from blip2.data.assets import fetch
from blip2.data.images import read_image
from blip2.demo.run import GREEDY, faster_precision, in_precision
from blip2.evaluation.report import new_figure
from blip2.evaluation.scenes import matching_accuracy, read_rows, read_truths, score_facts, score_twins
from blip2.memory import tune_malloc
from blip2.model.losses import query_statistics
from blip2.model.qformer import Block, QFormer
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.recipe import find_recipe, load_recipe
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    about: str
    change: Callable[[Recipe], Recipe]
    """What it changes of the demo's recipes."""
    readd: bool = False
    """Add the learned queries again before each cross-attention, as DETR does."""


def _diversity(weight: float) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, objectives=replace(recipe.objectives, query_diversity=float(weight)))


def _one_rate(recipe: Recipe) -> Recipe:
    rates = {"vision.*": "frozen", "language.*": "frozen", "*": 2e-4}
    recipe = _diversity(0)(recipe)
    return recipe if recipe.language else replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=rates))


def _without_positions(recipe: Recipe) -> Recipe:
    return replace(recipe, vision=replace(recipe.vision, position_encoding="none"))


VARIANTS = {
    "none": Variant("no term, as in the paper", _diversity(0)),
    "recipe": Variant("diversity term with the recipes' weights", lambda recipe: recipe),
    "term-1": Variant("diversity term, weight 1", _diversity(1)),
    "term-0.1": Variant("diversity term, weight 0.1", _diversity(0.1)),
    "one-rate": Variant("no term, one rate of 2e-4 for all parts", _one_rate),
    "readd": Variant("no term, queries added again before each cross-attention", _diversity(0), readd=True),
    "no-positions": Variant("the recipes without positions", _without_positions),
}


def recipes(folder: Path, variant: Variant, seed: int, steps: tuple[int, int] | None) -> dict[str, Recipe]:
    """Return the two stages of a variant; `steps` in place of the recipes' own."""
    precision = faster_precision()
    out = {}
    for number, stage in enumerate(("stage1", "stage2")):
        recipe = variant.change(load_recipe(find_recipe(f"demo-{stage}")))
        recipe = in_precision(recipe, precision, steps and steps[number])
        out[stage] = replace(
            recipe,
            output=str(folder / stage),
            start_from=str(folder / "stage1") if number else None,
            data=replace(recipe.data, features=str(folder.parents[1] / "features")),
            training=replace(recipe.training, seed=seed, eval_steps=50, save_steps=25),
        )
    return out


def readd_queries() -> None:
    """Change every Q-Former of this process: the learned queries are added before each cross-attention."""
    plain = QFormer.forward

    def forward(self: QFormer, *arguments: Any, **named: Any) -> Any:
        def add(block: nn.Module, inputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            return inputs[0] + self.queries, *inputs[1:]

        blocks = [block.cross_attention for block in self.blocks if isinstance(block, Block)]
        hooks = [each.register_forward_pre_hook(add) for each in blocks if each is not None]
        try:
            return plain(self, *arguments, **named)
        finally:
            for hook in hooks:
                hook.remove()

    QFormer.forward = forward


@torch.no_grad()
def measure(folder: Path, limit: int) -> dict[str, Any]:
    """Return what is measured of a variant's two runs on held-out compositions."""
    scenes = fetch("scenes-pairs")
    rows = read_rows(scenes / "test_compositions.jsonl")[:limit]
    compare, writer = load(folder / "stage1"), load(folder / "stage2")
    assert isinstance(compare, RepresentationPipeline) and isinstance(writer, GenerationPipeline)
    features = compare.encode_images([read_image(scenes / row["image"]) for row in rows])
    out: dict[str, Any] = {}
    for name, run in (("stage1", compare), ("stage2", writer)):
        metrics = read_metrics(folder / name)
        last = next(row for row in reversed(metrics) if "validation_loss" in row)
        out[name] = {key: value for key, value in last.items() if key.startswith("validation_")}
        out[f"{name}_curve"] = [
            {key: row[key] for key in ("step", "query_similarity", "validation_lm", "validation_itg") if key in row}
            for row in metrics
        ]
        out[f"{name}_by_block"] = by_block(run.model, features[:64])
    texts = [row["captions"][0] for row in rows]
    out["itm_accuracy"] = matching_accuracy(compare, features, texts)
    twin_rows = read_rows(scenes / "twins.jsonl")[:limit]
    seen = compare.encode_images([read_image(scenes / row["image"]) for row in twin_rows])
    twins = score_twins(compare, seen, [row["captions"][0] for row in twin_rows])
    types = [row["twin_type"] for row in twin_rows[::2]]
    out["twins"] = {name: each.accuracy["pairwise"] for name, each in twins.items()}
    for name, each in twins.items():
        for kind, some in each.by_type(types).items():
            out["twins"][f"{name} {kind}"] = some.accuracy["pairwise"]
    out["facts"] = score_facts(writer.caption(features, decoding=GREEDY), read_truths(rows))
    return out


def by_block(model: Any, features: Tensor) -> list[float]:
    """Return the mean cosine between an image's queries after each block."""
    found: list[float] = []

    def note(block: nn.Module, inputs: Any, output: tuple[Tensor, None]) -> None:
        found.append(float(query_statistics(output[0])["query_similarity"]))

    hooks = [block.register_forward_hook(note) for block in model.qformer.blocks]
    if isinstance(getattr(model, "language", None), nn.Module):
        model.query_outputs(features)
    else:
        model.qformer(model.build_image_memory(features))
    for hook in hooks:
        hook.remove()
    return found


# -- showing -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "cosine of queries, stage 1": lambda r: r["stage1"]["validation_query_similarity"],
    "cosine of queries, stage 2": lambda r: r["stage2"]["validation_query_similarity"],
    "held-out ITG loss": lambda r: r["stage1"]["validation_itg"],
    "held-out LM loss": lambda r: r["stage2"]["validation_lm"],
    "objects, %": lambda r: 100 * r["facts"]["objects"],
    "relation, %": lambda r: 100 * r["facts"]["relation"],
    "color, %": lambda r: 100 * r["facts"]["color"],
    "ITM accuracy, %": lambda r: 100 * r["itm_accuracy"],
    "twins by ITM, %": lambda r: 100 * r["twins"]["itm"],
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a table in Markdown: means over seeds, and standard deviations where there are several."""
    lines = ["| | n | " + " | ".join(COLUMNS) + " |", "|---|---:|" + "---:|" * len(COLUMNS)]
    for name, variant in VARIANTS.items():
        runs = list(results.get(name, {}).values())
        if not runs:
            continue
        cells = []
        for get in COLUMNS.values():
            values = [get(run) for run in runs]
            digits = 1 if max(values) > 1.5 else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {variant.about} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw similarity by step and by block, and the held-out loss of stage 2."""
    figure = new_figure(12, 3.4)
    panels = [figure.add_subplot(1, 3, i + 1) for i in range(3)]
    for color, name in enumerate(name for name in VARIANTS if name in results):
        for number, run in enumerate(results[name].values()):
            style = {"color": f"C{color}", "label": VARIANTS[name].about if number == 0 else None, "linewidth": 1.3}
            for axes, key, curve in ((panels[0], "query_similarity", "stage1"), (panels[2], "validation_lm", "stage2")):
                points = [(row["step"], row[key]) for row in run[f"{curve}_curve"] if key in row]
                axes.plot(*zip(*points, strict=True), **style)
            blocks = run["stage1_by_block"]
            panels[1].plot(range(1, len(blocks) + 1), blocks, marker="o", markersize=3, **style)
    titles = ("cosine of queries", "cosine of queries after stage 1", "held-out LM loss")
    for axes, title, x in zip(panels, titles, ("step of stage 1", "block", "step of stage 2"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/queries"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs=2, type=int, metavar=("STAGE1", "STAGE2"), help="default: the recipes'")
    parser.add_argument("--limit", type=int, default=240, help="held-out images that are measured")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    tune_malloc()
    for seed in options.seeds:
        for name in options.variants:
            done = options.output / name / str(seed) / "result.json"
            if options.table or done.is_file():
                continue
            variant = VARIANTS[name]
            if variant.readd:
                if options.variants != [name]:
                    print(f"{name} changes the Q-Former of the whole process: run it alone with --variants {name}")
                    continue
                readd_queries()
            for recipe in recipes(done.parent, variant, seed, options.steps).values():
                train(recipe, resume=True)
            done.write_text(json.dumps(measure(done.parent, options.limit), indent=1), encoding="utf-8")
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(options.output.glob("*/*/result.json")):
        results.setdefault(path.parts[-3], {})[path.parts[-2]] = json.loads(path.read_text(encoding="utf-8"))
    if not results:
        return
    (options.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, options.output / "queries.png")
    print(table(results))


if __name__ == "__main__":
    main()
