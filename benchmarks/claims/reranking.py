"""Re-ranking by ITM (paper §4.4): quality and cost over the number k of candidates.

    python benchmarks/claims/reranking.py --output runs/claims/reranking                    # trains three models
    python benchmarks/claims/reranking.py --models runs/mine/stage1 --output runs/mine/reranking

Stage 1 of the demo is trained with each seed, first as in demo-stage1, then with near twins in the batches as in
demo-twins, or checkpoints are given with --models. On held-out compositions and twins of the scenes, whose texts differ
from each other in one word or in the order of words, the k best candidates by ITC are re-ranked by ITM, in both
directions: by the logit of ITM alone, as in the paper, and by the logit plus the similarity divided by the temperature
of ITC, which adds the two log-odds that a pair matches. Of each set, the first 128 images are used, so that k = 128
re-ranks all pairs. R@1 is the mean over both directions; k = 0 is ITC alone. The cost of k is the time of ITM for k
texts of one image, the median of 16 images; encoding the images is not in it.

Results go to results.json, reranking.png and table.md in the output folder. A run that was killed continues; what is
done is not done again.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Claim,
    learn,
    load_stage1,
    make_parser,
    markdown,
    mean_spread,
    once,
    read_images,
    recall_at_1,
    same_text,
)

from blip2.config import Fusion
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import RetrievalResult, itm_logits, rerank, select_candidates

SETS = {"compositions": "test_compositions.jsonl", "twins": "twins.jsonl"}
"""The held-out sets by name; of each image the first caption is used."""
TWINS_STEPS = 400
"""Steps with near twins. ITM begins to tell them apart after about 150."""
BY: dict[str, tuple[Fusion, str]] = {"itm": ("itm", "ITM"), "sum": ("itm+itc/temperature", "ITM + ITC")}
"""What candidates are re-ranked by, with the title."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128)
TIMED_IMAGES = 16
"""Number of images over which the cost of k is measured."""


def train_model(claim: Claim, seed: int) -> Path:
    """Train stage 1 of the demo, then with near twins, and return the folder of the second run."""
    recipe = claim.recipe("twins", f"twins-{seed}", seed, TWINS_STEPS, "train_twins.jsonl")
    return learn(replace(recipe, start_from=str(claim.stage1(seed))))


@torch.no_grad()
def measure(run: str | Path, limit: int) -> dict[str, Any]:
    """Return R@1 by ITC alone by set, R@1 after re-ranking by set, score and k, and the milliseconds per image by k."""
    pipeline = load_stage1(run)
    found: dict[str, Any] = {"itc": {}, "recall": {}, "milliseconds": {}, "chance": {}}
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
        found["itc"][name] = recall_at_1(alone)
        found["recall"][name] = {by: {} for by in BY}
        for k in CANDIDATES:
            candidates = select_candidates(similarity, k)
            logits = [each[selected] for each, selected in zip(scores, candidates.union, strict=True)]
            for by, (fusion, _) in BY.items():
                result = rerank(similarity, positive, candidates, logits, fusion, pipeline.itc_temperature)
                found["recall"][name][by][k] = recall_at_1(result)
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


def table(models: dict[str, Any]) -> str:
    """Return the results by k as a table in Markdown."""
    runs = list(models.values())
    rows = [["ITC alone", *(mean_spread([run["itc"][name] for run in runs]) for name in SETS for _ in BY), "0"]]
    for k in map(str, CANDIDATES):
        cells = [mean_spread([run["recall"][name][by][k] for run in runs]) for name in SETS for by in BY]
        rows.append([k, *cells, mean_spread([run["milliseconds"][k] for run in runs], scale=1)])
    titles = [f"R@1 on {name} by {title}, %" for name in SETS for _, title in BY.values()]
    return markdown(["k", *titles, "ms per image"], rows)


def draw(models: dict[str, Any]) -> Any:
    """Return a figure of R@1 by k, with a panel for each set and a line for each model, and of the cost by k."""
    runs = list(models.values())
    figure = new_figure(9.6, 3.2)
    panels = [figure.add_subplot(1, len(SETS) + 1, i + 1) for i in range(len(SETS) + 1)]
    for axes, name in zip(panels, SETS, strict=False):
        for number, run in enumerate(runs):
            for color, (by, (_, title)) in enumerate(BY.items()):
                recall = [100 * run["recall"][name][by][str(k)] for k in CANDIDATES]
                label = title if number == 0 else None
                axes.plot(CANDIDATES, recall, color=f"C{color}", label=label, marker="o", markersize=3)
            label = "ITC alone" if number == 0 else None
            axes.axhline(100 * run["itc"][name], color="gray", linestyle="--", linewidth=0.8, label=label)
        axes.set_ylabel(f"R@1 on {name}, %", fontsize=9)
        axes.legend(fontsize=8)
    for run in runs:
        panels[-1].plot(CANDIDATES, [run["milliseconds"][str(k)] for k in CANDIDATES], "C2o-", markersize=3)
    panels[-1].set_ylabel("ms per image", fontsize=9)
    panels[-1].set_yscale("log")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("k", fontsize=9)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = make_parser(__doc__, "reranking")
    parser.add_argument("--models", nargs="+", help="runs or checkpoints of stage 1 (default: train one for each seed)")
    options = parser.parse_args()
    claim = Claim.start(parser, options, models=options.models)
    models: dict[str, Any] = {}
    for number, name in enumerate(options.models or claim.seeds):

        def work(name: str | int = name) -> dict[str, Any]:
            run = train_model(claim, name) if isinstance(name, int) else name
            return measure(run, claim.limit(128))

        models[str(name)] = once(claim.output / "done" / f"scores-{number if options.models else name}.json", work)
    claim.finish({"models": models}, table(models), draw(models))


if __name__ == "__main__":
    main()
