"""A better image encoder or a better LLM gives a better model (paper §4.1).

    python benchmarks/claims/encoders.py --output runs/claims/encoders
    python benchmarks/claims/encoders.py --output runs/claims/encoders-large --scale 8      # larger, on a GPU
    python benchmarks/claims/encoders.py --output runs/claims/encoders-try --quick          # to see that it works

The demo's model, with EfficientNet-Lite0 on images of 224 pixels and SmolLM2, is compared with the same model on a
weaker image encoder. There is one packaged image encoder, so the weaker one is the same network on images of 128
pixels, which gives 16 image tokens instead of 49. For the LLM, two sizes of a T5 that is trained here on the text of
the scenes alone (text_t5.py) are compared with each other: a small T5 learns in another number of steps than SmolLM2,
so the two kinds are not compared. Both stages of the demo's recipe are trained with each seed, stage 2 on captions
alone. The models are compared on held-out compositions by the facts in their captions, and those with a T5 also by
their answers to questions, on which they were not trained. How many questions each T5 answers when it reads the true
caption is written to results.json.

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
from text_t5 import QUESTION_PROMPT, SIZES, make_t5, with_t5

from blip2.decoding.options import Decoding
from blip2.evaluation.scenes import read_truths, score_answers, score_facts

SMALL_IMAGES = 128
"""Height and width of the images of the weaker encoder in pixels."""
VARIANTS = {
    "SmolLM2, 128 pixels": ("smollm2", SMALL_IMAGES),
    "SmolLM2, 224 pixels": ("smollm2", 224),
    "tiny T5, 224 pixels": ("t5-tiny", 224),
    "T5, 224 pixels": ("t5", 224),
}
"""The LLM and the height and width of the images in pixels, by the name of the variant."""
STEPS = {"smollm2": 80, "t5-tiny": 480, "t5": 480}
"""Steps of stage 2. A small T5, whose steps are cheap, begins to learn from the images after about 150."""
SCORES = {"objects": "objects, %", "color": "color, %", "relation": "relation, %", "all": "all facts, %"}
ANSWERS = {"answers": "right zero-shot answers, %"}


def measure(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Train both stages of a variant, and return the scores of :data:`SCORES`, with a T5 also :data:`ANSWERS`."""
    llm, pixels = VARIANTS[variant]
    stage1 = claim.stage1(seed)
    recipe = claim.recipe("stage2", f"{llm}-{pixels}-{seed}", seed, STEPS[llm])
    if llm in SIZES:
        recipe = with_t5(claim, recipe, llm)
    if pixels == SMALL_IMAGES:
        first = claim.recipe("stage1", f"stage1-{pixels}-{seed}", seed, STAGE1_STEPS)
        stage1 = learn(replace(first, vision=replace(first.vision, image_size=pixels)))
        recipe = replace(recipe, vision=replace(recipe.vision, image_size=pixels))
    pipeline = load_stage2(learn(replace(recipe, start_from=str(stage1))))
    rows, features = read_images(pipeline, "test_compositions.jsonl", claim.limit(160))
    captions = pipeline.caption(features, decoding=Decoding(num_beams=1, max_new_tokens=24))
    found = {**dict.fromkeys(SCORES, 0.0), **score_facts(captions, read_truths(rows))}
    if llm in SIZES:
        asked, features, image_index = read_questions(pipeline, claim.limit(300))
        prompts = pipeline.format_questions([row["question"] for row in asked], QUESTION_PROMPT)
        answers = pipeline.generate(features, prompts, Decoding(num_beams=1, max_new_tokens=4), image_index=image_index)
        found["answers"] = score_answers(answers, asked)["all"]
    return found


def main() -> None:
    parser = make_parser(__doc__, "encoders")
    claim = Claim.start(parser, parser.parse_args())
    scores = claim.compare(list(VARIANTS), lambda variant, seed: measure(claim, variant, seed))
    answered = {variant: scores[variant] for variant, (llm, _) in VARIANTS.items() if llm in SIZES}
    read = {variant: make_t5(claim, VARIANTS[variant][0])[1] for variant in answered}
    claim.finish(
        {"scores": scores, "answers_from_true_captions": read},
        "\n\n".join([score_table("model", scores, SCORES), score_table("model", answered, ANSWERS)]),
        draw_scores(scores, SCORES),
    )


if __name__ == "__main__":
    main()
