"""The ITG loss and retrieval (paper Table 6): stage 1 with ITC and ITM, and with ITC, ITM and ITG.

    python benchmarks/claims/itg.py --output runs/claims/itg
    python benchmarks/claims/itg.py --output runs/claims/itg-large --scale 8      # larger, on a GPU
    python benchmarks/claims/itg.py --output runs/claims/itg-try --quick          # to see that it works

Stage 1 of the demo's recipe is trained with each seed, with the three objectives and without ITG. Both are compared on
held-out compositions by recall at 1 and at 5 in both directions, after re-ranking by ITM as in the paper, and by the
accuracy of ITM on hard negatives. The paper fine-tunes on COCO with and without ITG after a pre-training that has all
three; here the objectives differ from the first step.

Results go to results.json, itg.png and table.md in the output folder. A run that was killed continues; what is done is
not done again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    STAGE1_STEPS,
    Claim,
    draw_scores,
    learn,
    load_stage1,
    make_parser,
    read_images,
    same_text,
    score_table,
)

from blip2.evaluation.retrieval import evaluate_retrieval
from blip2.evaluation.scenes import matching_accuracy

WITH, WITHOUT = "ITC + ITM + ITG", "ITC + ITM"
SCORES = {
    "image_to_text_r1": "image to text, R@1, %",
    "image_to_text_r5": "R@5, %",
    "text_to_image_r1": "text to image, R@1, %",
    "text_to_image_r5": "R@5, %",
    "itm_accuracy": "ITM on hard negatives, %",
}


def measure(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Train a variant, and return the scores of :data:`SCORES`."""
    run = claim.stage1(seed)
    if variant == WITHOUT:
        recipe = claim.recipe("stage1", f"without-itg-{seed}", seed, STAGE1_STEPS)
        run = learn(replace(recipe, objectives=replace(recipe.objectives, itg=0.0)))
    pipeline = load_stage1(run)
    rows, features = read_images(pipeline, "test_compositions_descriptions.jsonl", claim.limit(240))
    texts = [row["caption"] for row in rows]
    result = evaluate_retrieval(pipeline, features, texts, same_text(texts), rerank_k=16)
    found = {
        f"{direction}_{key}": getattr(result, direction)[key]
        for direction in ("image_to_text", "text_to_image")
        for key in ("r1", "r5")
    }
    return {**found, "itm_accuracy": matching_accuracy(pipeline, features, texts), "chance": result.chance["r1"]}


def main() -> None:
    parser = make_parser(__doc__, "itg")
    claim = Claim.start(parser, parser.parse_args())
    scores = claim.compare([WITHOUT, WITH], lambda variant, seed: measure(claim, variant, seed))
    claim.finish({"scores": scores}, score_table("objectives", scores, SCORES), draw_scores(scores, SCORES))


if __name__ == "__main__":
    main()
