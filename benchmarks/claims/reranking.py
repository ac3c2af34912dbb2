"""Re-ranking by ITM (paper §4.4): quality and cost over the number k of candidates.

    python benchmarks/claims/reranking.py --output runs/claims/reranking                    # trains three models
    python benchmarks/claims/reranking.py --models runs/mine/stage1 --output runs/mine/reranking

Stage 1 of the demo's recipe is trained with each seed, or checkpoints are given with --models. On held-out compositions
and twins of the scenes, whose texts differ from each other in one word or in the order of words, the k best candidates
by ITC are re-ranked by ITM, in both directions. Of each set, the first 128 images are used, so that k = 128 re-ranks
all pairs. R@1 is the mean over both directions; k = 0 is ITC alone. The cost of k is the time of ITM for k texts of one
image, the median of 16 images; encoding the images is not in it.

Results go to results.json, reranking.png and table.md in the output folder. A run that was killed continues; what is
done is not done again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    SCENES,
    demo_recipe,
    load_stage1,
    markdown,
    mean_spread,
    once,
    read_images,
    recall_at_1,
    same_text,
    seconds,
)

from blip2.data.assets import fetch
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import RetrievalResult, itm_logits, rerank, select_candidates
from blip2.io import write_json
from blip2.memory import tune_malloc
from blip2.training.trainer import train

SETS = {"compositions": "test_compositions.jsonl", "twins": "twins.jsonl"}
"""The held-out sets by name; of each image the first caption is used."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = 230
TIMED_IMAGES = 16
"""Number of images over which the cost of k is measured."""


def learn(output: Path, seed: int, steps: int) -> Path:
    """Train stage 1 of the demo, and return its folder."""
    run = output / "runs" / str(seed)
    source = str(fetch(SCENES) / "train.jsonl")
    recipe = demo_recipe("stage1", run, output / "features", seed, steps, source)

    def work() -> None:
        train(recipe, resume=True)

    once(output / "done" / f"train-{seed}.json", work)
    return run


@torch.no_grad()
def measure(run: str | Path, limit: int) -> dict[str, Any]:
    """Return R@1 by set and k, and the milliseconds per image by k."""
    pipeline = load_stage1(run)
    found: dict[str, Any] = {"recall": {}, "milliseconds": {}, "chance": {}}
    for name, file in SETS.items():
        rows, features = read_images(pipeline, file, limit)
        texts = [row["captions"][0] for row in rows]
        similarity, positive = pipeline.similarity(features, texts).cpu(), same_text(texts)
        ids, mask = pipeline.tokenize(texts)
        # All pairs are scored once; a smaller k uses some of these scores.
        every = torch.ones_like(positive)
        scores = torch.stack(
            [itm_logits(pipeline, image, ids, mask, row) for image, row in zip(features.split(1), every, strict=True)]
        )
        alone = RetrievalResult(similarity, similarity, positive)
        found["chance"][name] = alone.chance["r1"]
        found["recall"][name] = {0: recall_at_1(alone)}
        for k in CANDIDATES:
            candidates = select_candidates(similarity, k)
            logits = [each[selected] for each, selected in zip(scores, candidates.union, strict=True)]
            found["recall"][name][k] = recall_at_1(rerank(similarity, positive, candidates, logits, "itm"))
        if name == "compositions":
            for k in CANDIDATES:
                selected = select_candidates(similarity, k).i2t
                taken = []
                for image, row in zip(features[:TIMED_IMAGES].split(1), selected, strict=False):
                    started = time.perf_counter()
                    itm_logits(pipeline, image, ids, mask, row)  # ends with a copy to the CPU
                    taken.append(time.perf_counter() - started)
                found["milliseconds"][k] = 1000 * statistics.median(taken)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    runs = list(results["models"].values())
    rows = []
    for k in ("0", *map(str, CANDIDATES)):
        cells = [mean_spread([run["recall"][name][k] for run in runs]) for name in SETS]
        cost = mean_spread([run["milliseconds"][k] for run in runs], scale=1) if k != "0" else "0"
        rows.append(["ITC alone" if k == "0" else k, *cells, cost])
    return markdown(["k", *(f"R@1 on {name}, %" for name in SETS), "ms per image"], rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw R@1 by k and by cost, a line for each model."""
    figure = new_figure(9.0, 3.2)
    panels = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    for number, run in enumerate(results["models"].values()):
        for color, name in enumerate(SETS):
            recall = [100 * run["recall"][name][str(k)] for k in CANDIDATES]
            style = {"color": f"C{color}", "label": name if number == 0 else None, "marker": "o", "markersize": 3}
            panels[0].plot(CANDIDATES, recall, **style)
            panels[0].axhline(100 * run["recall"][name]["0"], color=f"C{color}", linestyle="--", linewidth=0.8)
            panels[1].plot([run["milliseconds"][str(k)] for k in CANDIDATES], recall, **style)
    for axes, title in zip(panels, ("k (dashed: ITC alone)", "ms per image"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylabel("R@1, %", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/claims/reranking"))
    parser.add_argument("--models", nargs="+", help="runs or checkpoints of stage 1 (default: train one for each seed)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the steps of the recipe (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps and images, which show nothing")
    options = parser.parse_args()
    if options.scale <= 0:
        parser.error("--scale has to be above 0")
    tune_malloc()
    output, limit = options.output, 8 if options.quick else 128
    steps = 2 if options.quick else max(1, round(options.scale * STEPS))
    settings = {"steps": None if options.models else steps, "limit": limit, "models": options.models}
    if once(output / "done" / "plan.json", lambda: settings) != settings:
        parser.error(f"{output} has other results: give another --output")
    models: dict[str, Any] = {}
    for number, name in enumerate(options.models or options.seeds):
        run = name if options.models else learn(output, name, steps)

        def work(run: str | Path = run) -> dict[str, Any]:
            return measure(run, limit)

        models[str(name)] = once(output / "done" / f"scores-{number if options.models else name}.json", work)
    results = {**settings, "models": models, "seconds": seconds(output / "done")}
    write_json(output / "results.json", results)
    draw(results, output / "reranking.png")
    (output / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
