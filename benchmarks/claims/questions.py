"""A Q-Former that reads the question (paper §4.3 and Figure 7), and one that does not.

    python benchmarks/claims/questions.py --output runs/claims/questions
    python benchmarks/claims/questions.py --queries 1 --output runs/claims/questions-1-query
    python benchmarks/claims/questions.py --output runs/claims/questions-large --scale 8      # larger, on a GPU
    python benchmarks/claims/questions.py --output runs/claims/questions-try --quick          # to see that it works

Figure 7 of the paper gives the question to the LLM and to the Q-Former. Both stages of the demo are trained with the
first seed, without the near twins of the demo. From there, the model is fine-tuned on questions with each seed: with
the question given to the Q-Former, as in the demo's recipe, and with the question given to the LLM alone. Both are
compared by the share of right answers about held-out compositions, by type of question, beside what the most frequent
answers of the training data reach without an image.

With 16 queries there is room for all that can be said about a scene. With --queries, both stages are trained with fewer
of them, so that the model without the question in the Q-Former has to choose without knowing what will be asked.

Results go to results.json, a figure with the name of the output folder, and table.md. A run that was killed continues;
what is done is not done again.
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
    read_questions,
    score_blind_answers,
    score_table,
)

from blip2.config import Recipe
from blip2.decoding.options import Decoding
from blip2.evaluation.scenes import score_answers

QUESTIONS = 400
"""Number of questions that are evaluated."""
VARIANTS = {"question to the LLM alone": False, "question to the Q-Former too": True}
STAGE2_STEPS, STEPS = 200, 160
SCORES = {
    "all": "right answers, %",
    "what": "what, %",
    "where": "where, %",
    "color": "color, %",
    "yesno": "yes or no, %",
}


def measure(claim: Claim, variant: str, seed: int, queries: int | None) -> dict[str, float]:
    """Fine-tune a variant, and return the share of right answers by type of question."""

    def recipe_of(stage: str, name: str, seed: int, steps: int, train: str = "train.jsonl") -> Recipe:
        recipe = claim.recipe(stage, name, seed, steps, train)
        if queries is not None:
            recipe = replace(recipe, qformer=replace(recipe.qformer, num_query_tokens=queries))
        return recipe

    first = claim.seeds[0]
    if queries is None:
        stage1 = claim.stage1(first)
    else:
        stage1 = learn(recipe_of("stage1", f"stage1-{first}", first, STAGE1_STEPS))
    stage2 = learn(replace(recipe_of("stage2", f"stage2-{first}", first, STAGE2_STEPS), start_from=str(stage1)))
    reads = VARIANTS[variant]
    recipe = recipe_of("vqa", f"reads-{reads}-{seed}", seed, STEPS, "train_questions.jsonl")
    run = learn(
        replace(
            recipe,
            start_from=[str(stage2), str(stage1)] if reads else str(stage2),
            qformer=replace(recipe.qformer, use_qformer_text_input=reads),
        )
    )
    pipeline = load_stage2(run)
    rows, features, image_index = read_questions(pipeline, claim.limit(QUESTIONS))
    questions = [row["question"] for row in rows]
    answers = pipeline.generate(
        features,
        pipeline.format_questions(questions),
        Decoding(num_beams=1, max_new_tokens=4),
        image_index=image_index,
        questions=questions,
    )
    return {**dict.fromkeys(SCORES, 0.0), **score_answers(answers, rows)}


def main() -> None:
    parser = make_parser(__doc__, "questions")
    parser.add_argument("--queries", type=int, help="number of queries of both stages (default: 16, of the recipe)")
    options = parser.parse_args()
    given = {} if options.queries is None else {"queries": options.queries}
    claim = Claim.start(parser, options, first_seed=options.seeds[0], **given)
    scores = claim.compare(list(VARIANTS), lambda variant, seed: measure(claim, variant, seed, options.queries))
    blind = score_blind_answers(claim.limit(QUESTIONS))
    scores["no image"] = {"": {**dict.fromkeys(SCORES, 0.0), **blind}}
    claim.finish({"scores": scores}, score_table("the question is given", scores, SCORES), draw_scores(scores, SCORES))


if __name__ == "__main__":
    main()
