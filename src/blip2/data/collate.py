"""Tokenize captions, questions and prompts, and collate the batches of both stages.

Legend: B batch, T text tokens, U target tokens, H and W height and width of an image in pixels, P image tokens, E width
of the image encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
"""Characters that LAVIS replaces by spaces in captions and removes from questions."""
MAX_WORDS = 50
"""Number of words to which LAVIS truncates a text."""


def normalize_captions(captions: Sequence[str], normalization: TextNormalization) -> list[str]:
    """Normalize captions.

    Args:
        captions: the captions.
        normalization: ``data.text_normalization``. ``lavis`` converts to lower case, replaces
            :data:`LAVIS_PUNCTUATION` by spaces, collapses repeated spaces and keeps the first :data:`MAX_WORDS` words.
            ``none`` changes nothing.
    """
    if normalization == "none":
        return list(captions)
    spaces = str.maketrans(dict.fromkeys(LAVIS_PUNCTUATION, " "))
    texts = (re.sub(r"\s{2,}", " ", text.lower().translate(spaces)) for text in captions)
    return [_first_words(text.rstrip("\n").strip(" ")) for text in texts]


def normalize_questions(questions: Sequence[str], normalization: TextNormalization) -> list[str]:
    """Normalize questions.

    Args:
        questions: the questions.
        normalization: ``data.text_normalization``. ``lavis`` converts to lower case, removes
            :data:`LAVIS_PUNCTUATION` and trailing spaces, and keeps the first :data:`MAX_WORDS` words; repeated spaces
            are not collapsed. ``none`` changes nothing.
    """
    if normalization == "none":
        return list(questions)
    removed = str.maketrans(dict.fromkeys(LAVIS_PUNCTUATION))
    return [_first_words(text.lower().translate(removed).rstrip(" ")) for text in questions]


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])


@dataclass(frozen=True)
class Stage1Collator:
    """Collates batches of stage 1. Captions become [CLS] ... [SEP], padded to the longest caption of the batch."""

    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the Q-Former."""
    max_tokens: int
    """Maximum number of tokens per caption, including [CLS] and [SEP]. Longer captions are truncated."""
    normalization: TextNormalization = "none"
    """Normalization of the captions (see :func:`normalize_captions`)."""
    requires_question = False
    """Whether every record must have a question."""

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
            captions: caption or answer of each image.
            questions: question about each image; empty if there is none. Unused in stage 1.
            image_ids: samples with equal ids have the same image.
            rng: random number generator for splitting captions (:class:`PrefixLMCollator`); unused otherwise.
        """
        captions = normalize_captions(captions, self.normalization)
        ids, mask, num_truncated = encode_texts(self.tokenizer, captions, self.max_tokens)
        return RepresentationBatch(images, ids, mask, image_ids), num_truncated


@dataclass(frozen=True)
class CausalLMCollator:
    """Collates batches of stage 2 for a decoder-only LLM.

    Each row consists of the prompt, the caption and an end token. The loss covers the caption and the end token.
    """

    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the LLM."""
    max_tokens: int
    """Maximum number of tokens per caption, including the end token but not the prompt. Longer captions are
    truncated."""
    prompt: str
    """Prompt before each caption. :data:`~blip2.config.QUESTION_PLACEHOLDER` in the prompt is replaced by the
    question."""
    eos_token_id: int
    """Id of the token that ends a caption."""
    qformer_tokenizer: PreTrainedTokenizerBase | None = None
    """Tokenizer of the Q-Former, if the Q-Former reads questions; otherwise ``None``."""
    question_prompt: str | None = None
    """Prompt of records that have a question; ``None``: :attr:`prompt`."""
    max_prompt_tokens: int | None = None
    """Maximum number of prompt tokens for which the LLM has positions; ``None``: unlimited."""
    normalization: TextNormalization = "none"
    """Normalization of captions and questions. Answers are not normalized."""
    qformer_reads_prompt: bool = False
    """Whether the Q-Former, if it has a tokenizer, reads the whole prompt. False: it reads the question alone."""

    @property
    def requires_question(self) -> bool:
        """Whether every record must have a question, because the prompt contains the placeholder for one."""
        return QUESTION_PLACEHOLDER in self.prompt

    def __call__(
        self,
        images: Tensor,
        captions: Sequence[str],
        questions: Sequence[str],
        image_ids: Int[Tensor, "B"],
        rng: np.random.Generator,
    ) -> tuple[GenerationBatch, int]:
        """Return the batch and the number of truncated captions. See :class:`Stage1Collator` for the arguments."""
        normalized = normalize_captions(captions, self.normalization)
        captions = [
            answer if question else caption
            for answer, caption, question in zip(captions, normalized, questions, strict=True)
        ]
        prompts = [self.format_prompt(question) for question in questions]
        ids, mask, labels, num_truncated = self._encode(prompts, captions, rng)
        texts = prompts if self.qformer_reads_prompt else normalize_questions(questions, self.normalization)
        encoded = encode_questions(self.qformer_tokenizer, texts)
        return GenerationBatch(images, ids, mask, labels, encoded), num_truncated

    def format_prompt(self, question: str) -> str:
        """Return the prompt of a record.

        Args:
            question: the question of the record; empty if the record has none.
        """
        prompt = self.question_prompt if question and self.question_prompt is not None else self.prompt
        return format_prompts(prompt, normalize_questions([question], self.normalization))[0]

    def num_prompt_tokens(self, prompt: str) -> int:
        check_unicode([prompt])
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _encode(
        self, prompts: Sequence[str], captions: Sequence[str], rng: np.random.Generator
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"], int]:
        """Return the ids, mask and labels of a :class:`GenerationBatch`, and the number of truncated captions."""
        return encode_continuations(self.tokenizer, prompts, captions, self.max_tokens, self.eos_token_id)


@dataclass(frozen=True)
class PrefixLMCollator(CausalLMCollator):
    """Collates batches of stage 2 for an encoder-decoder LLM (prefix language modeling, §3.3).

    With a prompt, the encoder reads the prompt and the decoder generates the caption. Without a prompt, each caption is
    split at random (:func:`split_caption`): the encoder reads the prefix and the decoder generates the suffix. Captions
    that are too long are truncated before they are split.
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
    """Return the prompt for each question, with :data:`~blip2.config.QUESTION_PLACEHOLDER` replaced by the question."""
    return [prompt.replace(QUESTION_PLACEHOLDER, question) for question in questions]


def encode_questions(tokenizer: PreTrainedTokenizerBase | None, questions: Sequence[str]) -> Questions | None:
    """Tokenize questions for a Q-Former that reads them. Return ``None`` if `tokenizer` is ``None``."""
    if tokenizer is None:
        return None
    ids, mask, _ = encode_texts(tokenizer, questions, tokenizer.model_max_length)
    return Questions(ids, mask)


def split_caption(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Split a caption of n words at random into prefix and suffix.

    Returns:
        The prefix, which has 1 to n // 2 words (uniformly distributed), and the suffix. If n is 1, the prefix is empty.
    """
    words = caption.split()
    at = int(rng.integers(1, len(words) // 2 + 1)) if len(words) > 1 else 0
    return " ".join(words[:at]), " ".join(words[at:])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], int]:
    """Tokenize texts for the Q-Former, padded on the right.

    Args:
        tokenizer: tokenizer of the Q-Former.
        texts: B texts.
        max_tokens: maximum number of tokens per text, including [CLS] and [SEP]. A text that is truncated ends with
            [SEP].

    Returns:
        Token ids, the mask (True for text tokens, False for padding), and the number of truncated texts.
    """
    check_unicode(texts)
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
    """Tokenize prompts and captions for a decoder-only LLM, padded on the right.

    A row consists of the special tokens that the tokenizer puts first (such as BOS), the prompt, the caption and the
    end token. Prompt and caption are tokenized together, as one text, because the LLM was trained on whole texts.

    Args:
        tokenizer: tokenizer of the LLM; it must return offsets.
        prompts: B prompts, which may be empty. White space at their ends is removed.
        captions: B captions.
        max_tokens: maximum number of tokens per caption, including the end token but not the prompt.
        eos_token_id: id of the end token.

    Returns:
        Token ids, the mask (True for text tokens, False for padding), the labels (the ids of caption and end token, and
        -100 for the prompt and padding), and the number of captions that were truncated.
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
    """Tokenize prompts for an LLM.

    White space at the end of a prompt is removed. Many tokenizers join a space with the word that follows, so a prompt
    that ends with a space would have different tokens from the same prompt followed by a text.

    Args:
        tokenizer: tokenizer of the LLM.
        prompts: B prompts.
        side: side of the padding: ``left`` for decoder-only LLMs, ``right`` for encoder-decoder LLMs.

    Returns:
        Token ids, and the mask (True for text tokens, False for padding).
    """
    check_unicode(prompts)
    rows = [tokenizer(prompt.rstrip())["input_ids"] for prompt in prompts]
    if side == "left":
        rows = [strip_eos(tokenizer, row) for row in rows]
    return pad(rows, 0, side), _padding_mask(rows, side)


def check_unicode(texts: Iterable[str]) -> None:
    """Check that texts have no lone surrogates, to which Python decodes bytes of an argument that are not UTF-8.

    Raises:
        InputError: a text has one, which no tokenizer accepts.
    """
    for text in texts:
        found = re.search("[\ud800-\udfff]", text)
        if found:
            raise InputError(f"the text {text!r} has {found[0]!r}, which is not a character: write the text in UTF-8")


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Check that a prompt has the same tokens in training, before a caption, and in generation, where no text follows.

    Args:
        tokenizer: tokenizer of a decoder-only LLM.
        prompt: the prompt, which may contain the placeholder for a question.

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
                f"the prompt {prompt!r} ends within a token: the last tokens of the prompt alone are"
                f" {tokenizer.convert_ids_to_tokens(alone)[-3:]}, but followed by the text {text!r} they are"
                f" {tokenizer.convert_ids_to_tokens(before)[-3:]}; end the prompt with a word or a colon"
            )


def strip_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the ids without the end token that some tokenizers append, so that more text can follow.

    The only token of an empty text may also be the first of every text, as OPT's </s> is, which stays.
    """
    if ids[-1:] != [tokenizer.eos_token_id]:
        return ids
    is_appended = len(ids) > 1 or tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return ids[:-1] if is_appended else ids


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "B T"]:
    """Stack rows of integers into one tensor, padded to the length of the longest row.

    Args:
        rows: B rows. Without rows, the result has the shape [0, 0].
        value: the value of the padding.
        side: side of the padding, ``left`` or ``right``.
    """
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _padding_mask(rows: Sequence[Sequence[int]], side: str = "right") -> Bool[Tensor, "B T"]:
    """Return the mask of padded rows: True for tokens, False for padding."""
    return pad([[1] * len(row) for row in rows], 0, side).bool()
