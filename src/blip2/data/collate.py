"""From texts to tokens: what each stage reads of a caption.

Legend: B batch, T text tokens, U target tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2.config import QUESTION_PLACE, TextNormalization
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, Questions
from blip2.model.losses import IGNORED
from blip2.model.representation import RepresentationBatch

StageBatch = RepresentationBatch | GenerationBatch
SIGNS = '.!"()*#:;~'
"""What LAVIS takes out of texts."""
MOST_WORDS = 50
"""Words of a text that LAVIS keeps."""


def normalize_captions(captions: Sequence[str], how: TextNormalization) -> list[str]:
    """Captions as ``data.text_normalization`` says: with ``lavis``, in lower case, with a space for each of
    :data:`SIGNS`, one space for several, and at most :data:`MOST_WORDS` words."""
    if how == "none":
        return list(captions)
    spaces = str.maketrans(dict.fromkeys(SIGNS, " "))
    texts = (re.sub(r"\s{2,}", " ", text.lower().translate(spaces)) for text in captions)
    return [_first_words(text.rstrip("\n").strip(" ")) for text in texts]


def normalize_questions(questions: Sequence[str], how: TextNormalization) -> list[str]:
    """Questions as ``data.text_normalization`` says: with ``lavis``, in lower case, without :data:`SIGNS` and spaces at
    the end, and at most :data:`MOST_WORDS` words. Unlike those of captions, spaces are left as they are."""
    if how == "none":
        return list(questions)
    nothing = str.maketrans(dict.fromkeys(SIGNS))
    return [_first_words(text.lower().translate(nothing).rstrip(" ")) for text in questions]


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MOST_WORDS])


@runtime_checkable
class TextPreparation(Protocol):
    """Turns images and captions into the batch that a stage trains on."""

    @property
    def asks(self) -> bool:
        """Whether captions are answers, and each needs its question."""
        ...

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        random: np.random.Generator,
    ) -> tuple[StageBatch, int]:
        """The batch, and how many captions were cut."""
        ...


@dataclass(frozen=True)
class RepresentationTexts:
    """Texts of stage 1: [CLS] ... [SEP], padded to the longest of the batch."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    normalization: TextNormalization = "none"
    asks = False

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        random: np.random.Generator,
    ) -> tuple[RepresentationBatch, int]:
        captions = normalize_captions(captions, self.normalization)
        ids, mask, cut = encode_texts(self.tokenizer, captions, self.max_tokens)
        return RepresentationBatch(images, ids, mask, image_ids), cut


@dataclass(frozen=True)
class GenerationTexts:
    """Texts of stage 2 for a decoder-only LLM: prompt, caption, end; loss on caption and end."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    prompt: str
    """:data:`QUESTION_PLACE` in it stands for the question."""
    end: int
    """Id of the token that ends a caption."""
    reader: PreTrainedTokenizerBase | None = None
    """Tokenizer of a Q-Former that reads questions."""
    question_prompt: str | None = None
    """Prompt of records that have a question, where it is not that of all."""
    room: int | None = None
    """Tokens that a prompt may have, for the LLM to have positions for it; None: any number."""
    normalization: TextNormalization = "none"
    """Of captions and questions. Answers are left as they are."""

    @property
    def asks(self) -> bool:
        return QUESTION_PLACE in self.prompt

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        random: np.random.Generator,
    ) -> tuple[GenerationBatch, int]:
        said = normalize_captions(captions, self.normalization)
        captions = [text if asks else caption for text, caption, asks in zip(captions, said, questions, strict=True)]
        said = normalize_questions(questions, self.normalization)
        prompts = [self.prompt_of(each) for each in questions]
        ids, mask, labels, cut = self._encode(prompts, captions, random)
        return GenerationBatch(images, ids, mask, labels, encode_questions(self.reader, said)), cut

    def prompt_of(self, question: str) -> str:
        """The prompt of a record, whose question may be blank."""
        asked = self.prompt if self.question_prompt is None else self.question_prompt
        said = normalize_questions([question], self.normalization)
        return fill_prompts(asked if question else self.prompt, said)[0]

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _encode(
        self, prompts: Sequence[str], captions: Sequence[str], random: np.random.Generator
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"], int]:
        """Ids, mask and labels of a :class:`GenerationBatch`, and how many captions were cut."""
        return encode_continuations(self.tokenizer, prompts, captions, self.max_tokens, self.end)


@dataclass(frozen=True)
class PrefixTexts(GenerationTexts):
    """Texts of stage 2 for an encoder-decoder LLM (prefix language modeling, §3.3).

    With a prompt, the encoder reads the prompt and the decoder writes the caption. Without, each caption is split at
    random: of n words the first 1 to n // 2 (uniformly) go to the encoder and the rest is what the decoder writes; a
    caption of one word is written whole. A caption that is too long is cut before it is split.
    """

    def _encode(
        self, prompts: Sequence[str], captions: Sequence[str], random: np.random.Generator
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"], int]:
        prefixes, suffixes, cut = [], [], 0
        for caption, prompt in zip(captions, prompts, strict=True):
            encoded = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if len(encoded["input_ids"]) >= self.max_tokens:
                caption = caption[: encoded["offset_mapping"][self.max_tokens - 2][1]]
                cut += 1
            prefix, suffix = (prompt, caption) if prompt else split_caption(caption, random)
            prefixes.append(prefix)
            suffixes.append(suffix)
        ids, mask = encode_prompts(self.tokenizer, prefixes, "right")
        rows = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in suffixes]
        rows = [[*row[: self.max_tokens - 1], self.end] for row in rows]
        return ids, mask, pad(rows, IGNORED), cut


def fill_prompts(prompt: str, questions: Sequence[str]) -> list[str]:
    """The prompt of each question."""
    return [prompt.replace(QUESTION_PLACE, question) for question in questions]


def encode_questions(tokenizer: PreTrainedTokenizerBase | None, questions: Sequence[str]) -> Questions | None:
    """Questions for a Q-Former that reads them; None for one that has no tokenizer."""
    if tokenizer is None:
        return None
    ids, mask, _ = encode_texts(tokenizer, questions, tokenizer.model_max_length)
    return Questions(ids, mask)


def split_caption(caption: str, random: np.random.Generator) -> tuple[str, str]:
    """Prefix and suffix of a caption, split at random between its words (see :class:`PrefixTexts`)."""
    words = caption.split()
    at = int(random.integers(1, len(words) // 2 + 1)) if len(words) > 1 else 0
    return " ".join(words[:at]), " ".join(words[at:])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], int]:
    """Ids and mask of texts for the Q-Former, and how many texts were cut to `max_tokens`."""
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    cut = sum(len(row) > max_tokens for row in rows)
    rows = [row if len(row) <= max_tokens else [*row[: max_tokens - 1], row[-1]] for row in rows]  # [SEP] stays
    return pad(rows, 0), pad([[1] * len(row) for row in rows], 0).bool(), cut


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], captions: Sequence[str], max_tokens: int, end: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B T"], int]:
    """Prompt, caption and end token of each row for a decoder-only LLM, padded on the right.

    The text is tokenized in one piece, as the LLM saw text when it was trained, behind whatever the tokenizer puts
    first by itself (BOS, for those that have one).

    Returns:
        Ids, mask, labels (-100 on prompt and padding), and how many captions were cut: those that would take more
        than `max_tokens` tokens, end included.
    """
    rows, labels, cut = [], [], 0
    for prompt, caption in zip(prompts, captions, strict=True):
        prompt = prompt.rstrip()
        text = f"{prompt} {caption}" if prompt else caption
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = strip_end(tokenizer, encoded["input_ids"]), encoded["offset_mapping"]
        # A token belongs to the caption if it ends beyond the prompt; special tokens have the empty span (0, 0).
        first = next((i for i in range(len(ids)) if offsets[i][1] > len(prompt)), len(ids))
        cut += len(ids) - first + 1 > max_tokens
        ids = [*ids[: first + max_tokens - 1], end]
        rows.append(ids)
        labels.append([IGNORED] * first + ids[first:])
    return pad(rows, end), pad([[1] * len(row) for row in rows], 0).bool(), pad(labels, IGNORED), cut


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], side: str
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids and mask of prompts; decoder-only LLMs need them padded on the left, encoders on the right.

    White space at the end of a prompt is left out: many tokenizers join the space before a word with the word, so that
    the tokens of a prompt that ends with one are never those that a text follows.
    """
    rows = [tokenizer(prompt.rstrip())["input_ids"] for prompt in prompts]
    if side == "left":
        rows = [strip_end(tokenizer, row) for row in rows]
    return pad(rows, 0, side), pad([[1] * len(row) for row in rows], 0, side).bool()


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Make sure that a decoder-only LLM is trained on a prompt's tokens as they are when texts are written.

    Raises:
        InputError: the tokens of the prompt are others where a text follows.
    """
    (filled,) = fill_prompts(prompt, ["what is this?"])
    alone = encode_prompts(tokenizer, [filled], "left")[0][0].tolist()
    for text in ("a", "The", "7"):
        ids, _, labels, _ = encode_continuations(tokenizer, [filled], [text], 2**31, 0)
        before = ids[0][labels[0] == IGNORED].tolist()
        if before != alone:
            raise InputError(
                f"the prompt {prompt!r} ends within a token: alone its last tokens are"
                f" {tokenizer.convert_ids_to_tokens(alone)[-3:]}, before the text {text!r} they are"
                f" {tokenizer.convert_ids_to_tokens(before)[-3:]}; end the prompt with a word or a colon"
            )


def strip_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers append by themselves: the text goes on."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "B T"]:
    """Rows of ints as one tensor, padded to the longest."""
    longest = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), longest), value, dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            out[i, place] = torch.tensor(row, dtype=torch.long)
    return out
