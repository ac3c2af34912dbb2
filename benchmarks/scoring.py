"""python benchmarks/scoring.py [--questions 64] [--answers 100] [--sample 100] [--rounds 1] [--tiny]

Ranks candidate answers to questions, one question for each image, beside transformers, which scores them one by one:
the loss of each answer with its end token. Both sides have the same weights and run in this process, a few questions
each in turns. CPU time is measured, so that other load on the machine does not matter much. The networks are those of
stage2.py: a ViT-S/16, a Q-Former of 6 blocks of 384, and an LLM with the shapes of SmolLM2-135M, with random weights.

A second peer encodes each image once and gives its visual prompt to the LLM, which code that calls transformers' parts
can do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stage2
import torch
from PIL import Image

TOLERANCE = 1e-4
"""Largest difference of the log-likelihoods per token."""
Side = Callable[[slice, list[str]], torch.Tensor]
PROMPT_LENGTH, ANSWER_LENGTHS = 12, (1, 3)
"""Number of words of each prompt, and of the shortest and the longest answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answers", type=int, default=100, help="candidates for each question")
    parser.add_argument("--sample", type=int, help="answers of each question that the peers score (default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side")
    parser.add_argument("--tiny", action="store_true", help="networks of two narrow blocks, to try the program")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    import blip2

    stage2.prepare("answers", "llama", folder, tiny=options.tiny)
    ours: Any = blip2.load(folder, device="cpu", dtype="fp32")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(options.questions)]
    vocabulary = ours.model.language.vocab_size

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in random.integers(4, vocabulary - 1, count))

    prompts = [words(PROMPT_LENGTH) for _ in images]
    answers = [words(random.integers(ANSWER_LENGTHS[0], ANSWER_LENGTHS[1] + 1)) for _ in range(options.answers)]
    sample = answers[: options.sample]
    sides = transformers_sides(folder, images, prompts)
    sides = {"blip2": lambda part, texts: ours.score(images[part], texts, prompt=prompts[part]).per_token, **sides}
    for side in sides.values():  # the first pass is slower
        side(slice(0, 1), answers[:2])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    difference = 0.0
    for _ in range(options.rounds):
        taken = dict.fromkeys(sides, 0.0)
        for start in range(0, options.questions, ours.batch_size):
            part, values = slice(start, start + ours.batch_size), {}
            for name, side in sides.items():
                started = time.process_time()
                values[name] = side(part, answers if name == "blip2" else sample)
                taken[name] += time.process_time() - started
            mine = values["blip2"][:, : len(sample)]
            theirs = [values[name] for name in sides if name != "blip2"]
            difference = max(difference, *(float((mine - each).abs().max()) for each in theirs))
        for name, each in taken.items():
            scored = options.questions * len(answers if name == "blip2" else sample)
            seconds[name].append(each / scored)
    print(f"{options.questions} questions with {options.answers} answers each; {torch.get_num_threads()} threads")
    for name, each in seconds.items():
        ratios = [peer / mine for peer, mine in zip(each, seconds["blip2"], strict=True)]
        print(
            f"{name}: {1000 * statistics.median(each):.2f} ms of CPU time an answer,"
            f" {statistics.median(ratios):.1f} times as long as blip2 ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    print(f"largest difference of a log-likelihood per token: {difference:.1e}")
    if difference > TOLERANCE:
        raise SystemExit(f"the results differ by more than {TOLERANCE}")


def transformers_sides(folder: Path, images: list[Image.Image], prompts: list[str]) -> dict[str, Side]:
    """Return functions that score all answers to some questions one by one, as [questions, answers]."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

    model: Any = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = Blip2Processor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], stage2.END]
        return torch.tensor([[*before, *after]]), torch.tensor([[*(-100 for _ in before), *after]])

    @torch.no_grad()
    def one_by_one(part: slice, answers: list[str]) -> torch.Tensor:
        rows = []
        for image, prompt in zip(images[part], prompts[part], strict=True):
            pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            for answer in answers:
                ids, labels = encode(prompt, answer)
                placeholders = torch.full((1, stage2.QUERIES), stage2.IMAGE)
                ids = torch.cat([placeholders, ids], 1)
                labels = torch.cat([torch.full_like(placeholders, -100), labels], 1)
                rows.append(
                    -model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
                )
        return torch.stack(rows).view(-1, len(answers))

    @torch.no_grad()
    def image_once(part: slice, answers: list[str]) -> torch.Tensor:
        rows = []
        for image, prompt in zip(images[part], prompts[part], strict=True):
            pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            visual = model.get_image_features(pixels).pooler_output
            for answer in answers:
                ids, labels = encode(prompt, answer)
                embeds = torch.cat([visual, model.get_input_embeddings()(ids)], 1)
                labels = torch.cat([torch.full(visual.shape[:2], -100), labels], 1)
                rows.append(-model.language_model(inputs_embeds=embeds, labels=labels).loss)
        return torch.stack(rows).view(-1, len(answers))

    return {"transformers": one_by_one, "transformers, each image encoded once": image_once}


if __name__ == "__main__":
    main()
