"""A Q-Former that reads the question (paper §4.3 and Figure 7), and one that does not.

    python benchmarks/claims/questions.py --output runs/claims/questions
    python benchmarks/claims/questions.py --output runs/claims/questions-large --scale 8      # larger, on a GPU
    python benchmarks/claims/questions.py --output runs/claims/questions-try --quick          # to see that it works

Figure 7 of the paper gives the question to the LLM and to the Q-Former. Both stages of the demo are trained with the
first seed, without the near twins of the demo. From there, the model is fine-tuned on questions with each seed: with
the question given to the Q-Former, as in the demo's recipe, and with the question given to the LLM alone. Both are
compared by the share of right answers about held-out compositions, by type of question, beside what the most frequent
answers of the training data reach without an image.

Results go to results.json, questions.png and table.md in the output folder. A run that was killed continues; what is
done is not done again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import Claim, draw_scores, learn, load_stage2, make_parser, read_questions, score_blind_answers, score_table

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


def measure(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Fine-tune a variant, and return the share of right answers by type of question."""
    first = claim.seeds[0]
    stage1 = claim.stage1(first)
    stage2 = learn(replace(claim.recipe("stage2", f"stage2-{first}", first, STAGE2_STEPS), start_from=str(stage1)))
    reads = VARIANTS[variant]
    recipe = claim.recipe("vqa", f"reads-{reads}-{seed}", seed, STEPS, "train_questions.jsonl")
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
    options = parser.parse_args()
    claim = Claim.start(parser, options, first_seed=options.seeds[0])
    scores = claim.compare(list(VARIANTS), lambda variant, seed: measure(claim, variant, seed))
    blind = score_blind_answers(claim.limit(QUESTIONS))
    scores["no image"] = {"": {**dict.fromkeys(SCORES, 0.0), **blind}}
    claim.finish({"scores": scores}, score_table("the question is given", scores, SCORES), draw_scores(scores, SCORES))


if __name__ == "__main__":
    main()
