"""A better image encoder or a better LLM gives a better model (paper §4.1).

    python benchmarks/claims/encoders.py --output runs/claims/encoders
    python benchmarks/claims/encoders.py --output runs/claims/encoders-large --scale 8      # larger, on a GPU
    python benchmarks/claims/encoders.py --output runs/claims/encoders-try --quick          # to see that it works

Two image encoders and two LLMs are combined, each with every seed. There is one packaged image encoder, so the weaker
one is the same network on images of 128 pixels instead of 224, which gives 16 image tokens instead of 49. The LLMs are
two sizes of a T5 that is trained here on the text of the scenes alone (text_t5.py); how many questions each answers
when it reads the true caption is written to results.json. Both stages of the demo's recipe are trained, stage 2 on
captions alone. The models are compared on held-out compositions by the facts in their captions and by their answers to
questions, on which they were not trained.

Results go to results.json, encoders.png and table.md in the output folder. A run that was killed continues; what is
done is not done again.
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
    load_stage2,
    make_parser,
    read_images,
    read_questions,
    score_table,
)
from text_t5 import PROMPT, QUESTION_PROMPT, make_t5

from blip2.decoding.options import Decoding
from blip2.evaluation.scenes import read_truths, score_answers, score_facts

SMALL_IMAGES = 128
"""Height and width of the images of the weaker encoder in pixels."""
STEPS = 480
"""Steps of stage 2. A small T5 begins to learn from the images after about 150."""
VARIANTS = {
    f"{pixels} pixels, {llm}": (pixels, llm) for llm in ("t5-tiny", "t5") for pixels in (SMALL_IMAGES, 224)
}  # fmt: skip
SCORES = {"objects": "objects, %", "color": "color, %", "relation": "relation, %", "answers": "right answers, %"}


def measure(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Train both stages of a variant, and return the scores of :data:`SCORES`."""
    pixels, llm = VARIANTS[variant]
    stage1 = claim.stage1(seed)
    recipe = claim.recipe("stage2", f"{llm}-{pixels}-{seed}", seed, STEPS)
    assert recipe.language is not None
    recipe = replace(recipe, language=replace(recipe.language, name=str(make_t5(claim, llm)[0]), prompt=PROMPT))
    if pixels == SMALL_IMAGES:
        first = claim.recipe("stage1", f"stage1-{pixels}-{seed}", seed, STAGE1_STEPS)
        stage1 = learn(replace(first, vision=replace(first.vision, image_size=pixels)))
        recipe = replace(recipe, vision=replace(recipe.vision, image_size=pixels))
    pipeline = load_stage2(learn(replace(recipe, start_from=str(stage1))))
    rows, features = read_images(pipeline, "test_compositions.jsonl", claim.limit(160))
    captions = pipeline.caption(features, decoding=Decoding(num_beams=1, max_new_tokens=24))
    asked, features, image_index = read_questions(pipeline, claim.limit(300))
    prompts = pipeline.format_questions([row["question"] for row in asked], QUESTION_PROMPT)
    answers = pipeline.generate(features, prompts, Decoding(num_beams=1, max_new_tokens=4), image_index=image_index)
    found = {**dict.fromkeys(SCORES, 0.0), **score_facts(captions, read_truths(rows))}
    return {**found, "answers": score_answers(answers, asked)["all"]}


def main() -> None:
    parser = make_parser(__doc__, "encoders")
    claim = Claim.start(parser, parser.parse_args())
    scores = claim.compare(list(VARIANTS), lambda variant, seed: measure(claim, variant, seed))
    read = {llm: make_t5(claim, llm)[1] for _, llm in VARIANTS.values()}
    claim.finish(
        {"scores": scores, "answers_from_true_captions": read},
        score_table("image encoder, LLM", scores, SCORES),
        draw_scores(scores, SCORES),
    )


if __name__ == "__main__":
    main()
