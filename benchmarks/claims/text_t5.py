"""Small T5 models that learn the words of the scenes from text alone, for claims about encoder-decoder LLMs.

No package has a small encoder-decoder, so one is trained here: it reads a caption and writes it again after
"Describe:", or answers a question about the caption after "Question: ... Short answer:", the paper's prompt for FlanT5.
It never sees an image. Stage 2 then takes it as a frozen LLM, and the soft visual prompt takes the place of the
caption.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SCENES, Claim, fit, once
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from blip2.config import OptimizerConfig, Recipe
from blip2.data.assets import fetch
from blip2.data.collate import pad
from blip2.evaluation.scenes import read_rows, score_answers
from blip2.model.losses import IGNORE_INDEX

PROMPT, QUESTION_PROMPT = "Describe:", "Question: {} Short answer:"
SIZES = {
    "t5-tiny": {"d_model": 48, "d_kv": 12, "d_ff": 192, "num_layers": 1, "num_heads": 4},
    "t5": {"d_model": 192, "d_kv": 32, "d_ff": 768, "num_layers": 4, "num_heads": 6},
}
STEPS, BATCH_SIZE = 1200, 64
READ_QUESTIONS = 300
"""Number of questions about held-out captions that are evaluated."""
SPECIAL = ("<pad>", "</s>", "<unk>")
OPTIMIZER = OptimizerConfig(learning_rate={"*": 2e-3}, warmup_steps=50, min_lr_rate=0.05)
QFORMER_RATE = 1e-4
"""Learning rate of the Q-Former in stage 2 with a T5. Gradients through the T5 are much larger than through SmolLM2,
and at 4e-4 the queries that stage 1 taught to differ become alike again."""


def read_pairs(folder: Path, split: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the captions of a split, and its questions, each with the ``caption`` of its image."""
    captions = {row["image"]: row["captions"][0] for row in read_rows(folder / f"{split}.jsonl")}
    rows = read_rows(folder / f"{split}_questions.jsonl")
    return list(captions.values()), [{**row, "caption": captions[row["image"]]} for row in rows]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words of texts, in lower case; </s> ends a text."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_t5(claim: Claim, name: str) -> tuple[Path, float]:
    """Train a T5 once for all claims.

    Args:
        claim: the claim.
        name: a key of :data:`SIZES`.

    Returns:
        The folder of the T5, and the share of questions about held-out captions that it answers from the text.
    """
    steps = claim.steps(STEPS)
    folder = claim.shared / "t5" / f"{name}-{steps}"

    def work() -> float:
        scenes = fetch(SCENES)
        captions, rows = read_pairs(scenes, "train")
        questions = [(row["caption"], QUESTION_PROMPT.format(row["question"]), row["answers"][0]) for row in rows]
        tokenizer = make_tokenizer([*captions, PROMPT, *(text for pair in questions for text in pair)])
        torch.manual_seed(0)
        # The padding token begins the decoder's text, as in T5's checkpoints.
        special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "dropout_rate": 0.0, **SIZES[name], **special}
        model: Any = T5ForConditionalGeneration(T5Config(**sizes))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)

        def encode(texts: list[str], padding: int) -> Tensor:
            return pad(tokenizer(texts)["input_ids"], padding).to(device)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([0, step])
            drawn = [questions[i] for i in rng.integers(len(questions), size=BATCH_SIZE * 3 // 4)]
            drawn += [(captions[i], PROMPT, captions[i]) for i in rng.integers(len(captions), size=BATCH_SIZE // 4)]
            ids = encode([f"{caption} {prompt}" for caption, prompt, _ in drawn], 0)
            labels = encode([text for _, _, text in drawn], IGNORE_INDEX)
            return model(input_ids=ids, attention_mask=ids != 0, labels=labels).loss

        fit(model, OPTIMIZER, steps, 0, loss_of, folder.with_suffix(".pt"))
        _, held_out = read_pairs(scenes, "test_compositions")
        held_out = held_out[: claim.limit(READ_QUESTIONS)]
        ids = encode([f"{row['caption']} {QUESTION_PROMPT.format(row['question'])}" for row in held_out], 0)
        with torch.no_grad():
            tokens = model.generate(ids, attention_mask=ids != 0, max_new_tokens=4, do_sample=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return score_answers(tokenizer.batch_decode(tokens, skip_special_tokens=True), held_out)["all"]

    return folder, once(claim.shared / "done" / f"{folder.name}.json", work)


def with_t5(claim: Claim, recipe: Recipe, name: str) -> Recipe:
    """Return a recipe of stage 2 with a T5, whose name is a key of :data:`SIZES`, in the place of its LLM."""
    assert recipe.language is not None
    rates = {**recipe.optimizer.learning_rate, "*": QFORMER_RATE}
    return replace(
        recipe,
        language=replace(recipe.language, name=str(make_t5(claim, name)[0]), prompt=PROMPT),
        optimizer=replace(recipe.optimizer, learning_rate=rates),
    )
