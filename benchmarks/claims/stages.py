"""Stage 2 with and without stage 1 (paper Figure 5): zero-shot answers to questions over the steps of stage 2.

    python benchmarks/claims/stages.py --output runs/claims/stages                # SmolLM2, a decoder-only LLM
    python benchmarks/claims/stages.py --llm t5 --output runs/claims/stages-t5    # an encoder-decoder
    python benchmarks/claims/stages.py --output runs/claims/stages-large --scale 8      # larger, on a GPU
    python benchmarks/claims/stages.py --output runs/claims/stages-try --quick    # to see that it works

Stage 2 of the demo's recipe is trained on captions with each seed, once from stage 1 and once without it, and asked
questions about held-out compositions on the way. It never sees a question in training. An LLM as small as SmolLM2 may
answer with a sentence, so the answer is the likeliest of at most eight choices; results.json also has the share of
right answers among those that are generated as in the paper. At the end, both are also compared by the facts in their
captions. A T5 that is trained here on the text of the scenes alone (text_t5.py) stands for FlanT5, which was trained on
instructions. The dashed line is what guessing reaches; the dotted line is what the LLM answers when it reads the true
caption in place of the image: SmolLM2 by choices, and the T5 in words.

Results go to results.json, a figure with the name of the output folder, and table.md. A run that was killed continues;
what is done is not done again.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    SCENES,
    Claim,
    draw_curves,
    learn,
    load_stage2,
    make_parser,
    markdown,
    mean_spread,
    once,
    read_images,
    write_rows,
)
from text_t5 import QUESTION_PROMPT, make_t5, with_t5

from blip2.config import EvaluationConfig
from blip2.data.assets import fetch, resolve
from blip2.decoding.options import Decoding
from blip2.evaluation.scenes import read_rows, read_truths, score_facts
from blip2.training.metrics import read_metrics

VARIANTS = ("with stage 1", "without stage 1")
STEPS = {"smollm2": 120, "t5": 480}
"""Steps of stage 2. A small T5, whose steps are cheap, begins to learn from the images after about 150."""
EVALUATIONS = 4
"""How often the model is asked on the way."""
QUESTIONS, MAX_CHOICES = 100, 8
CAPTIONS = 160
"""Number of images whose captions are compared at the end."""
FACTS = ("objects", "color", "relation", "all")
SMOLLM2_PROMPT = "\nQuestion: {} Answer:"


def add_choices(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return questions with the column ``choices``: the right answer and others to questions of the same type."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["question_type"], set()).add(row["answers"][0])
    out = []
    for number, row in enumerate(rows):
        others = sorted(answers[row["question_type"]] - {row["answers"][0]})
        drawn = random.Random(number).sample(others, min(len(others), MAX_CHOICES - 1))
        out.append({**row, "choices": sorted([*drawn, row["answers"][0]])})
    return out


def choose_questions(claim: Claim) -> list[dict[str, Any]]:
    """Return the questions that are asked, with their choices."""
    # The choices are drawn from all questions, so that they do not depend on how many are asked.
    return add_choices(read_rows(fetch(SCENES) / "test_compositions_questions.jsonl"))[: claim.limit(QUESTIONS)]


def write_questions(claim: Claim) -> tuple[str, float]:
    """Write the questions with their choices, and return the path and the share that guessing answers."""
    scenes, rows = fetch(SCENES), choose_questions(claim)
    path = write_rows(claim.output / "questions.jsonl", [{**row, "image": str(scenes / row["image"])} for row in rows])
    return path, sum(1 / len(row["choices"]) for row in rows) / len(rows)


@torch.no_grad()
def read_captions(claim: Claim) -> float:
    """Return the share of the questions whose right choice is the likeliest for SmolLM2, which reads the true caption
    in place of the image."""
    language = claim.recipe("stage2", "", 0, 1).language
    assert language is not None
    folder = resolve(language.name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    captions = {row["image"]: row["captions"][0] for row in read_rows(fetch(SCENES) / "test_compositions.jsonl")}
    right = 0
    rows = choose_questions(claim)
    for row in rows:
        prompt = captions[row["image"]] + SMOLLM2_PROMPT.format(row["question"])
        length = len(tokenizer(prompt)["input_ids"])
        likelihoods = []
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
            tokens = model(ids[None]).logits[0, length - 1 : -1].log_softmax(-1)
            likelihoods.append(tokens.gather(1, ids[length:, None]).sum())
        right += row["choices"][int(torch.stack(likelihoods).argmax())] == row["answers"][0]
    return right / len(rows)


def measure(claim: Claim, llm: str, variant: str, seed: int) -> dict[str, Any]:
    """Train a variant, and return the share of right answers by step, and by type of question at the end."""
    recipe = claim.recipe("stage2", f"{variant.replace(' ', '-')}-{seed}", seed, STEPS[llm])
    if llm == "t5":
        recipe = with_t5(claim, recipe, "t5")
    steps = recipe.training.max_steps
    evaluation = EvaluationConfig(
        task="vqa", data=write_questions(claim)[0], rank_by="lm", eval_steps=max(1, steps // EVALUATIONS),
        prompt=QUESTION_PROMPT if llm == "t5" else SMOLLM2_PROMPT,
        max_new_tokens=5, rules="lavis",  # which normalize answers: "A zebra." is right
    )  # fmt: skip
    start_from = str(claim.stage1(seed)) if variant == "with stage 1" else None
    run = learn(replace(recipe, start_from=start_from, evaluation=evaluation))
    curve = {row["step"]: row for row in read_metrics(run) if "evaluation_accuracy" in row}
    last = run / "evaluation" / f"step-{steps:08d}" / "metrics.json"
    return {
        "accuracy": {step: row["evaluation_ranked_accuracy"] for step, row in curve.items()},
        "generated": {step: row["evaluation_accuracy"] for step, row in curve.items()},
        "by_type": json.loads(last.read_text(encoding="utf-8"))["ranked"]["by_question_type"],
        "loss": {step: row["lm"] for step, row in curve.items()},
    }


def measure_captions(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Return the shares of right facts in captions of held-out compositions, after the last step."""
    pipeline = load_stage2(claim.output / "runs" / f"{variant.replace(' ', '-')}-{seed}")
    rows, features = read_images(pipeline, "test_compositions.jsonl", claim.limit(CAPTIONS))
    captions = pipeline.caption(features, decoding=Decoding(num_beams=1, max_new_tokens=24))
    return {**dict.fromkeys(FACTS, 0.0), **score_facts(captions, read_truths(rows))}


def table(scores: dict[str, Any]) -> str:
    """Return the right answers by step, and by type of question and the facts in captions at the end, in percent."""
    runs = {variant: list(by_seed.values()) for variant, by_seed in scores.items()}
    first = next(iter(runs.values()))[0]
    rows = [
        [variant, *(mean_spread([run["accuracy"][step] for run in each]) for step in first["accuracy"])]
        for variant, each in runs.items()
    ]
    by_type = [
        [variant, *(mean_spread([run["by_type"][name] for run in each]) for name in first["by_type"])]
        for variant, each in runs.items()
    ]
    facts = [
        [variant, *(mean_spread([run["captions"][name] for run in each]) for name in FACTS)]
        for variant, each in runs.items()
    ]
    columns = [f"after {step} steps" for step in first["accuracy"]]
    return "\n".join(
        [
            markdown(["right answers, %", *columns], rows),
            "",
            markdown(["at the end, by type, %", *first["by_type"]], by_type),
            "",
            markdown(["facts in captions at the end, %", *FACTS], facts),
        ]
    )


def main() -> None:
    parser = make_parser(__doc__, "stages")
    parser.add_argument("--llm", choices=("smollm2", "t5"), default="smollm2")
    options = parser.parse_args()
    claim = Claim.start(parser, options, llm=options.llm)
    scores = claim.compare(VARIANTS, lambda variant, seed: measure(claim, options.llm, variant, seed))
    for variant, by_seed in scores.items():
        for seed, each in by_seed.items():
            each["captions"] = once(
                claim.output / "done" / f"captions-{variant.replace(' ', '-')}-{seed}.json",
                partial(measure_captions, claim, variant, int(seed)),
            )
    levels = {"guessing": write_questions(claim)[1]}
    if options.llm == "t5":
        levels["the T5 reads the true caption"] = make_t5(claim, "t5")[1]
    else:
        levels["SmolLM2 reads the true caption"] = once(
            claim.output / "done" / "captions-read.json", partial(read_captions, claim)
        )
    curves = {
        variant: {seed: each["accuracy"] for seed, each in by_seed.items()} for variant, by_seed in scores.items()
    }
    figure = draw_curves(curves, ("step of stage 2", "zero-shot answers, right, %"), levels)
    claim.finish({"llm": options.llm, "scores": scores, "levels": levels}, table(scores), figure)


if __name__ == "__main__":
    main()
