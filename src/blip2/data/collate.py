"""Tokenization: from captions, questions and prompts to the batch of each stage.

Legend: B batch, T text tokens, U target tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from blip2.config import QUESTION_PLACEHOLDER, TextNormalization
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, Questions
from blip2.model.losses import IGNORE_INDEX
from blip2.model.representation import RepresentationBatch

StageBatch = RepresentationBatch | GenerationBatch
LAVIS_PUNCTUATION = '.!"()*#:;~'
"""Characters that LAVIS removes from texts."""
MAX_WORDS = 50
"""Maximum number of words per text in LAVIS."""


def normalize_captions(captions: Sequence[str], normalization: TextNormalization) -> list[str]:
    """Normalize captions as ``data.text_normalization`` says.

    ``lavis`` converts to lower case, replaces :data:`LAVIS_PUNCTUATION` by spaces, collapses spaces and keeps the first
    :data:`MAX_WORDS` words; ``none`` changes nothing.
    """
    if normalization == "none":
        return list(captions)
    spaces = str.maketrans(dict.fromkeys(LAVIS_PUNCTUATION, " "))
    texts = (re.sub(r"\s{2,}", " ", text.lower().translate(spaces)) for text in captions)
    return [_first_words(text.rstrip("\n").strip(" ")) for text in texts]


def normalize_questions(questions: Sequence[str], normalization: TextNormalization) -> list[str]:
    """Normalize questions as ``data.text_normalization`` says.

    ``lavis`` converts to lower case, removes :data:`LAVIS_PUNCTUATION` and trailing spaces and keeps the first
    :data:`MAX_WORDS` words. Unlike in captions, repeated spaces stay. ``none`` changes nothing.
    """
    if normalization == "none":
        return list(questions)
    removed = str.maketrans(dict.fromkeys(LAVIS_PUNCTUATION))
    return [_first_words(text.lower().translate(removed).rstrip(" ")) for text in questions]


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])


@dataclass(frozen=True)
class Stage1Collator:
    """Collates stage 1: captions as [CLS] ... [SEP] for the Q-Former, padded to the longest of the batch."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    normalization: TextNormalization = "none"
    requires_question = False
    """Whether captions are answers that each need a question."""

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        rng: np.random.Generator,
    ) -> tuple[RepresentationBatch, int]:
        """Return the batch and the number of truncated captions.

        Args:
            images: pixels [B, 3, H, W] or features [B, P, E].
            questions: question of each caption; empty for captions without one.
            image_ids: samples with equal ids show the same image.
            rng: the source of all randomness.
        """
        captions = normalize_captions(captions, self.normalization)
        ids, mask, num_truncated = encode_texts(self.tokenizer, captions, self.max_tokens)
        return RepresentationBatch(images, ids, mask, image_ids), num_truncated


@dataclass(frozen=True)
class CausalLMCollator:
    """Collates stage 2 for a decoder-only LLM: prompt, caption, end token. The loss covers caption and end token."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    prompt: str
    """Prompt, in which :data:`~blip2.config.QUESTION_PLACEHOLDER` stands for the question."""
    eos_token_id: int
    """Id of the token that ends a caption."""
    qformer_tokenizer: PreTrainedTokenizerBase | None = None
    """Tokenizer of a question-conditioned Q-Former; ``None`` for one that does not read questions."""
    question_prompt: str | None = None
    """Prompt of records that have a question; ``None``: :attr:`prompt`."""
    max_prompt_tokens: int | None = None
    """Maximum number of prompt tokens for which the LLM has positions; ``None``: unlimited."""
    normalization: TextNormalization = "none"
    """Normalization of captions and questions. Answers stay as they are."""

    @property
    def requires_question(self) -> bool:
        """Whether captions are answers that each need a question."""
        return QUESTION_PLACEHOLDER in self.prompt

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        rng: np.random.Generator,
    ) -> tuple[GenerationBatch, int]:
        """Return the batch and the number of truncated captions; see :class:`Stage1Collator`."""
        normalized = normalize_captions(captions, self.normalization)
        captions = [
            answer if question else caption
            for answer, caption, question in zip(captions, normalized, questions, strict=True)
        ]
        prompts = [self.format_prompt(question) for question in questions]
        ids, mask, labels, num_truncated = self._encode(prompts, captions, rng)
        encoded = encode_questions(self.qformer_tokenizer, normalize_questions(questions, self.normalization))
        return GenerationBatch(images, ids, mask, labels, encoded), num_truncated

    def format_prompt(self, question: str) -> str:
        """Return the prompt of a record; `question` is empty if it has none."""
        prompt = self.question_prompt if question and self.question_prompt is not None else self.prompt
        return format_prompts(prompt, normalize_questions([question], self.normalization))[0]

    def num_prompt_tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _encode(
        self, prompts: Sequence[str], captions: Sequence[str], rng: np.random.Generator
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"], int]:
        """Return ids, mask and labels of a :class:`GenerationBatch`, and the number of truncated captions."""
        return encode_continuations(self.tokenizer, prompts, captions, self.max_tokens, self.eos_token_id)


@dataclass(frozen=True)
class PrefixLMCollator(CausalLMCollator):
    """Collates stage 2 for an encoder-decoder LLM (prefix language modeling, §3.3).

    With a prompt, the encoder reads the prompt and the decoder generates the caption. Without a prompt, each caption is
    split at random: of n words the encoder reads the first 1 to n // 2 (uniformly) and the decoder generates the
    rest; a caption of one word is generated whole. A caption that is too long is truncated before it is split.
    """

    def _encode(
        self, prompts: Sequence[str], captions: Sequence[str], rng: np.random.Generator
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"], int]:
        prefixes, suffixes, num_truncated = [], [], 0
        for caption, prompt in zip(captions, prompts, strict=True):
            encoded = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if len(encoded["input_ids"]) >= self.max_tokens:
                caption = caption[: encoded["offset_mapping"][self.max_tokens - 2][1]]
                num_truncated += 1
            prefix, suffix = (prompt, caption) if prompt else split_caption(caption, rng)
            prefixes.append(prefix)
            suffixes.append(suffix)
        ids, mask = encode_prompts(self.tokenizer, prefixes, "right")
        rows = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in suffixes]
        rows = [[*row[: self.max_tokens - 1], self.eos_token_id] for row in rows]
        return ids, mask, pad(rows, IGNORE_INDEX), num_truncated


Collator = Stage1Collator | CausalLMCollator


def format_prompts(prompt: str, questions: Sequence[str]) -> list[str]:
    """Return the prompt with each question in the place of the placeholder."""
    return [prompt.replace(QUESTION_PLACEHOLDER, question) for question in questions]


def encode_questions(tokenizer: PreTrainedTokenizerBase | None, questions: Sequence[str]) -> Questions | None:
    """Tokenize questions for a question-conditioned Q-Former; ``None`` if there is no tokenizer."""
    if tokenizer is None:
        return None
    ids, mask, _ = encode_texts(tokenizer, questions, tokenizer.model_max_length)
    return Questions(ids, mask)


def split_caption(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Split a caption at random between its words into prefix and suffix (see :class:`PrefixLMCollator`)."""
    words = caption.split()
    at = int(rng.integers(1, len(words) // 2 + 1)) if len(words) > 1 else 0
    return " ".join(words[:at]), " ".join(words[at:])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], int]:
    """Tokenize texts for the Q-Former; return ids, mask and the number of texts truncated to `max_tokens`."""
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    num_truncated = sum(len(row) > max_tokens for row in rows)
    rows = [row if len(row) <= max_tokens else [*row[: max_tokens - 1], row[-1]] for row in rows]  # [SEP] stays
    return pad(rows, 0), _padding_mask(rows), num_truncated


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    captions: Sequence[str],
    max_tokens: int,
    eos_token_id: int,
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B T"], int]:
    """Tokenize prompt, caption and end token of each row for a decoder-only LLM, padded on the right.

    Prompt and caption are tokenized as one text, like the LLM's training data, after the special tokens that the
    tokenizer puts first (such as BOS).

    Returns:
        Ids, mask, labels (-100 on prompt and padding), and the number of captions truncated to `max_tokens` tokens,
        end token included.
    """
    rows, labels, num_truncated = [], [], 0
    for prompt, caption in zip(prompts, captions, strict=True):
        prompt = prompt.rstrip()
        text = f"{prompt} {caption}" if prompt else caption
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = strip_eos(tokenizer, encoded["input_ids"]), encoded["offset_mapping"]
        # A token belongs to the caption if it ends beyond the prompt; special tokens have the empty span (0, 0).
        first = next((i for i in range(len(ids)) if offsets[i][1] > len(prompt)), len(ids))
        num_truncated += len(ids) - first + 1 > max_tokens
        ids = [*ids[: first + max_tokens - 1], eos_token_id]
        rows.append(ids)
        labels.append([IGNORE_INDEX] * first + ids[first:])
    return pad(rows, eos_token_id), _padding_mask(rows), pad(labels, IGNORE_INDEX), num_truncated


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], side: str
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Tokenize prompts; return ids and mask.

    Trailing white space is removed: many tokenizers join the space before a word with the word, so a prompt that ends
    with a space would have other tokens than the same prompt before a text.

    Args:
        side: side of the padding, ``left`` for decoder-only LLMs and ``right`` for encoders.
    """
    rows = [tokenizer(prompt.rstrip())["input_ids"] for prompt in prompts]
    if side == "left":
        rows = [strip_eos(tokenizer, row) for row in rows]
    return pad(rows, 0, side), _padding_mask(rows, side)


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Check that a prompt has the same tokens in training, before a text, as in generation, where nothing follows.

    Raises:
        InputError: the tokens differ.
    """
    (filled,) = format_prompts(prompt, ["what is this?"])
    alone = encode_prompts(tokenizer, [filled], "left")[0][0].tolist()
    for text in ("a", "The", "7"):
        ids, _, labels, _ = encode_continuations(tokenizer, [filled], [text], 2**31, 0)
        before = ids[0][labels[0] == IGNORE_INDEX].tolist()
        if before != alone:
            raise InputError(
                f"the prompt {prompt!r} ends within a token: alone its last tokens are"
                f" {tokenizer.convert_ids_to_tokens(alone)[-3:]}, before the text {text!r} they are"
                f" {tokenizer.convert_ids_to_tokens(before)[-3:]}; end the prompt with a word or a colon"
            )


def strip_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Remove the end token that some tokenizers append, so that text can follow."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "B T"]:
    """Stack rows of integers into one tensor, padded to the longest row."""
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _padding_mask(rows: Sequence[Sequence[int]], side: str = "right") -> Bool[Tensor, "B T"]:
    """Return True for the tokens of padded rows and False for padding."""
    return pad([[1] * len(row) for row in rows], 0, side).bool()
