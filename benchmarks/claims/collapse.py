"""The number of queries (paper §3.1), with queries that differ and with queries that collapse into one vector.

    python benchmarks/claims/collapse.py --output runs/claims/collapse
    python benchmarks/claims/collapse.py --queries 1 32 --seeds 0 --output runs/claims/collapse-short

Stage 1 of the demo's recipe is trained with 1 to 32 queries, with the diversity term of the recipe and without it, as
in the paper, with each seed. Without the term, the queries of small runs collapse (docs/queries.md): then 32 queries
should do no more than one. All models are compared on held-out compositions and twins of the scenes.

Results go to results.json, collapse.png and table.md in the output folder. A run that was killed continues; what is
done is not done again.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
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
from queries import VARIANTS, by_block

from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import evaluate_retrieval
from blip2.evaluation.scenes import matching_accuracy, score_twins

KINDS = {"recipe": "with the diversity term", "none": "without it"}
"""The variants of benchmarks/queries.py that are compared."""
QUERIES = (1, 8, 32)
STEPS = 80
SCORES = {
    "cosine": "cosine of queries",
    "itc": "R@1, ITC, %",
    "itm": "R@1, re-ranked by ITM, %",
    "itm_accuracy": "ITM on hard negatives, %",
    "twins": "twins by ITM, %",
}


def measure(claim: Claim, kind: str, num_queries: int, seed: int) -> dict[str, float]:
    """Train stage 1, and return the scores of :data:`SCORES`; shares are in [0, 1]."""
    recipe = VARIANTS[kind].change(claim.recipe("stage1", f"{kind}-{num_queries}-{seed}", seed, STEPS))
    run = learn(replace(recipe, qformer=replace(recipe.qformer, num_query_tokens=num_queries)))
    limit = claim.limit(160)
    pipeline = load_stage1(run)
    rows, features = read_images(pipeline, "test_compositions.jsonl", limit)
    texts = [row["captions"][0] for row in rows]
    result = evaluate_retrieval(pipeline, features, texts, same_text(texts), rerank_k=16)
    assert result.itc is not None
    twin_rows, twin_features = read_images(pipeline, "twins.jsonl", limit)
    twins = score_twins(pipeline, twin_features, [row["captions"][0] for row in twin_rows])
    return {
        # One query has no other to be compared with.
        "cosine": by_block(pipeline.model, features[:64])[-1] if pipeline.config.qformer.num_query_tokens > 1 else 1.0,
        "itc": recall_at_1(result.itc),
        "itm": recall_at_1(result),
        "itm_accuracy": matching_accuracy(pipeline, features, texts),
        "twins": twins["itm"].accuracy["pairwise"],
        "chance": result.chance["r1"],
    }


def table(scores: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the scores, by kind, number of queries and seed, as a table in Markdown."""
    rows = []
    for kind, by_queries in scores.items():
        for num_queries, by_seed in by_queries.items():
            runs = list(by_seed.values())
            cells = [
                mean_spread([run[key] for run in runs], *((1, 2) if key == "cosine" else (100, 1))) for key in SCORES
            ]
            rows.append([KINDS[kind], num_queries, *cells])
    return markdown(["stage 1", "queries", *SCORES.values()], rows)


def draw(scores: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Any:
    """Return a figure with each score by the number of queries, a line for each kind and a point for each seed."""
    figure = new_figure(3.0 * len(SCORES), 3.2)
    for number, (key, title) in enumerate(SCORES.items(), 1):
        axes = figure.add_subplot(1, len(SCORES), number)
        factor = 1 if key == "cosine" else 100
        for color, (kind, by_queries) in enumerate(scores.items()):
            counts = [int(count) for count in by_queries]
            means = [factor * statistics.mean(run[key] for run in runs.values()) for runs in by_queries.values()]
            axes.plot(counts, means, color=f"C{color}", label=KINDS[kind])
            for count, runs in by_queries.items():
                values = [factor * run[key] for run in runs.values()]
                axes.plot([int(count)] * len(values), values, "o", color=f"C{color}", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("queries", fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        if number == 1:
            axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = make_parser(__doc__, "collapse")
    parser.add_argument("--queries", nargs="+", type=int, default=list(QUERIES))
    options = parser.parse_args()
    if min(options.queries) < 1:
        parser.error(f"--queries has {min(options.queries)}, expected numbers of at least 1")
    claim = Claim.start(parser, options)
    scores: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for seed in claim.seeds:
        for kind in KINDS:
            for num_queries in options.queries:

                def work(kind: str = kind, num_queries: int = num_queries, seed: int = seed) -> dict[str, float]:
                    return measure(claim, kind, num_queries, seed)

                found = once(claim.output / "done" / f"scores-{kind}-{num_queries}-{seed}.json", work)
                scores.setdefault(kind, {}).setdefault(str(num_queries), {})[str(seed)] = found
    claim.finish({"scores": scores}, table(scores), draw(scores))


if __name__ == "__main__":
    main()
