"""Use stage-2 models: caption images and answer questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2.config import IMAGE_TOKEN, ModelConfig
from blip2.data.collate import (
    check_unicode,
    encode_continuations,
    encode_prompts,
    encode_questions,
    format_prompts,
    normalize_questions,
    pad,
)
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationModel, Questions
from blip2.model.losses import IGNORE_INDEX
from blip2.pipelines.base import Images, Pipeline, check_texts

QUESTION_TEMPLATE = "Question: {} Answer:"
"""Default prompt of questions for a decoder-only LLM (§4.1)."""
NO_LIMIT = 2**31
"""A maximum number of tokens that truncates no text."""
SHORT_QUESTION_TEMPLATE = "Question: {} Short answer:"
"""Default prompt of questions for an encoder-decoder LLM (§4.1)."""


class GenerationPipeline(Pipeline[GenerationModel]):
    """A stage-2 model, which generates text about images."""

    def __init__(
        self,
        model: GenerationModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        path: Path,
        eos_token_id: int,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config, path)
        self.eos_token_id = eos_token_id
        self.qformer_tokenizer = qformer_tokenizer

    def caption(
        self, images: Images, prompt: str | Sequence[str] | None = None, decoding: Decoding | None = None
    ) -> list[str]:
        """Caption images.

        Args:
            images: images.
            prompt: text that the caption continues: one for all images, or one per image. None: the prompt with which
                the model was trained.
            decoding: options of text generation. None: ``CAPTION_DECODING`` of :mod:`blip2.decoding.options`.

        Returns:
            One caption per image, without the prompt.

        Raises:
            InputError: an image cannot be decoded, the numbers of prompts and images differ, or `prompt` is None for a
                model that was trained to answer questions.
        """
        assert self.config.language is not None
        features = self.encode_images(images)
        if prompt is None and self.config.language.prompt_has_question:
            raise InputError(
                f"{self.path} was trained to answer questions: use answer() (blip2 ask), or pass a prompt that the"
                " caption continues"
            )
        prompt = self.config.language.prompt if prompt is None else prompt
        prompts = [prompt] * len(features) if isinstance(prompt, str) else list(prompt)
        return self.generate(features, prompts, decoding or CAPTION_DECODING)

    def answer(self, images: Images, questions: str | Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """Answer questions about images.

        Args:
            images: one image per question, or a single image for all questions.
            questions: one question per image, or a single question for all images.
            decoding: options of text generation. None: ``ANSWER_DECODING`` of :mod:`blip2.decoding.options`.

        Returns:
            One answer per pair of image and question.

        Raises:
            InputError: the numbers of images and questions differ and neither is 1, or a question is blank.
        """
        features, listed = self.encode_images(images), check_texts(questions, "question")
        if len(listed) == 1:
            listed = listed * len(features)
        image_index = [0] * len(listed) if len(features) == 1 else range(len(features))
        if len(image_index) != len(listed):
            raise InputError(
                f"there are {len(features)} images and {len(listed)} questions: give one question per image, or one"
                " image or one question for all"
            )
        return self.generate(
            features,
            self.format_questions(listed),
            decoding or ANSWER_DECODING,
            image_index=image_index,
            questions=listed,
        )

    @property
    def question_template(self) -> str:
        """The prompt of questions, with {} in the place of the question.

        It is the prompt with which the model was trained or, for a model that was not trained on questions, the paper's
        prompt (§4.1).
        """
        assert self.config.language is not None
        template = self.config.language.question_template
        if template is not None:
            return template
        return SHORT_QUESTION_TEMPLATE if self.model.language.is_encoder_decoder else QUESTION_TEMPLATE

    def format_questions(self, questions: Sequence[str], template: str | None = None) -> list[str]:
        """Return the prompt of each question. Questions are normalized with the model's ``text_normalization``.

        Args:
            questions: questions.
            template: prompt with {} in the place of the question. None: :attr:`question_template`.
        """
        questions = normalize_questions(questions, self.config.text_normalization)
        return format_prompts(self.question_template if template is None else template, questions)

    @torch.no_grad()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        decoding: Decoding,
        num_return_sequences: int = 1,
        image_index: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
        uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    ) -> list[str]:
        """Generate text for prompts about images.

        Args:
            images: images.
            prompts: prompts, as text without an image placeholder.
            decoding: options of text generation.
            num_return_sequences: number of texts per prompt.
            image_index: index in `images` of the image of each prompt. None: one image per prompt. Several prompts
                about one image are cheaper with `image_index` than with copies of the image: the image encoder and the
                Q-Former process the image once.
            questions: the question in each prompt, for a Q-Former that reads questions. The Q-Former then processes an
                image once per question. Other models ignore the questions.
            uniforms: random numbers in [0, 1) for sampling, one for each token of each of the N texts that are
                returned, so that a text does not depend on the other texts. None: PyTorch's own random numbers.

        Returns:
            The N = len(prompts) * `num_return_sequences` texts. The texts of one prompt are next to each other.

        Raises:
            InputError: the numbers of prompts and images (or of prompts and `image_index`) differ, an index is out of
                range, or a prompt is too long for the LLM or contains an image placeholder.
        """
        features = self.encode_images(images)
        indices = list(range(len(features)) if image_index is None else image_index)
        if image_index is None and len(indices) != len(prompts):
            raise InputError(f"there are {len(features)} images and {len(prompts)} prompts: give one prompt per image")
        if len(indices) != len(prompts):
            raise InputError(f"image_index has {len(indices)} entries for {len(prompts)} prompts: give one per prompt")
        wrong = next((index for index in indices if not 0 <= index < len(features)), None)
        if wrong is not None:
            raise InputError(
                f"image_index contains {wrong}, expected 0 to {len(features) - 1}: give the index of one of the images"
            )
        with_token = next((prompt for prompt in prompts if IMAGE_TOKEN in prompt), None)
        if with_token is not None:
            raise InputError(f"the prompt {with_token!r} contains {IMAGE_TOKEN}: remove {IMAGE_TOKEN}, because the"
                             " image is placed first automatically")  # fmt: skip
        side = "right" if self.model.language.is_encoder_decoder else "left"
        ids, mask = encode_prompts(self.tokenizer, prompts, side)
        self._check_length(ids.shape[1], decoding)
        encoded = self._encode_questions(questions)
        visual = self._visual_prompts(features, encoded, torch.tensor(indices))
        if encoded is not None:  # each question has its own visual prompt
            indices = list(range(len(prompts)))
        # Batch prompts about the same image together, or else prompts of similar length.
        lengths, shared = mask.sum(dim=1).tolist(), len(set(indices)) < len(indices)
        order = sorted(range(len(prompts)), key=lambda i: (indices[i] if shared else 0, lengths[i]))
        texts = [""] * len(prompts) * num_return_sequences
        for start in range(0, len(order), self.batch_size):
            rows = torch.tensor(order[start : start + self.batch_size])
            used, image = torch.tensor(indices)[rows].unique(return_inverse=True)
            columns = mask[rows].any(dim=0)
            new = self.model.language.generate(
                visual[used.to(self.device)],
                ids[rows][:, columns].to(self.device),
                mask[rows][:, columns].to(self.device),
                decoding,
                self.eos_token_id,
                num_return_sequences,
                image.to(self.device),
                None if uniforms is None else uniforms.unflatten(0, (-1, num_return_sequences))[rows].flatten(0, 1),
            )
            decoded = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, row in enumerate(rows.tolist()):
                texts[row * num_return_sequences : (row + 1) * num_return_sequences] = (
                    text.strip() for text in decoded[i * num_return_sequences : (i + 1) * num_return_sequences]
                )
        return texts

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Images,
        prompts: Sequence[str],
        texts: Sequence[str],
        image_index: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "N"]:
        """Return the log-probability (natural logarithm) of each text with its end token, given image and prompt.

        Args:
            images: images.
            prompts: the prompt of each text.
            texts: texts to score; they are not truncated.
            image_index: index in `images` of the image of each text. None: one image per text.
            questions: the question in each prompt; see :meth:`generate`.
        """
        features = self.encode_images(images)
        indices = torch.arange(len(texts)) if image_index is None else torch.tensor(image_index)
        encoded = self._encode_questions(questions)
        visual = self._visual_prompts(features, encoded, indices)
        if encoded is not None:  # each question has its own visual prompt
            indices = torch.arange(len(texts))
        out = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self._continuations(texts[part], prompts[part])
            states, labels = self.model.language.hidden_states(visual[indices[part].to(self.device)], *batch)
            log_probs = self.model.language.lm_head(states).float().log_softmax(dim=-1)
            token = log_probs.gather(1, labels[:, None]).squeeze(1)
            counts = (batch[2] != IGNORE_INDEX).sum(dim=1).tolist()
            out += [each.sum() for each in token.split(counts)]
        return torch.stack(out)

    def _encode_questions(self, questions: Sequence[str] | None) -> Questions | None:
        """Return the normalized questions as tokens for the Q-Former; None without questions."""
        if questions is None:
            return None
        return encode_questions(self.qformer_tokenizer, normalize_questions(questions, self.config.text_normalization))

    def _continuations(
        self, texts: Sequence[str], prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"]]:
        """Return token ids, attention mask and labels of prompts with texts, as in training.

        For a decoder-only LLM, the ids contain prompt and text; for an encoder-decoder LLM, the prompt alone, so that
        the length U of the labels differs from T.
        """
        check_unicode([*prompts, *texts])
        if not self.model.language.is_encoder_decoder:
            ids, mask, labels, _ = encode_continuations(self.tokenizer, prompts, texts, NO_LIMIT, self.eos_token_id)
        else:
            ids, mask = encode_prompts(self.tokenizer, prompts, "right")
            rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            labels = pad([[*row, self.eos_token_id] for row in rows], IGNORE_INDEX)
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def _visual_prompts(
        self, features: Float[Tensor, "I P E"], questions: Questions | None, image_index: Int[Tensor, "B"]
    ) -> Float[Tensor, "N Q L"]:
        """Return the visual prompt of each image, or of each question if there are any. L is the width of the LLM."""
        if questions is None:
            return torch.cat([self.model.visual_prompt(part) for part in features.split(self.batch_size)])
        parts = []
        for rows in torch.arange(len(image_index)).split(self.batch_size):
            used, image = image_index[rows].unique(return_inverse=True)
            words = int(questions.mask[rows].sum(dim=1).max())
            part = Questions(*(each[rows, :words].to(self.device) for each in questions))
            parts.append(self.model.visual_prompt(features[used.to(self.device)], part, image.to(self.device)))
        return torch.cat(parts)

    def _check_length(self, tokens: int, decoding: Decoding) -> None:
        language, queries = self.model.language, self.config.qformer.num_query_tokens
        positions = language.max_position_embeddings
        new = 0 if language.is_encoder_decoder else decoding.max_new_tokens
        if positions is not None and queries + tokens + new > positions:
            raise InputError(
                f"a prompt has {tokens} tokens, but of the LLM's {positions} positions only {positions - queries - new}"
                f" are left beside {queries} tokens of the image and {new} to generate: shorten the prompt"
            )
