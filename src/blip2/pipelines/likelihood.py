"""Likelihoods of texts under the LLM of a stage-2 model, and the scores that follow from them.

Legend: I images, N texts, V visual prompts, Q queries, L width of the LLM, T text tokens, U target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from blip2.backbones.language import VISUAL_PADDING
from blip2.config import IMAGE_TOKEN, QUESTION_PLACEHOLDER, ModelConfig, ScoreName
from blip2.data.arrays import blank_input
from blip2.data.collate import (
    check_unicode,
    encode_continuations,
    encode_prompts,
    encode_questions,
    format_prompts,
    normalize_captions,
    normalize_questions,
    pad,
)
from blip2.errors import InputError
from blip2.model.generation import GenerationModel, Questions
from blip2.model.losses import IGNORE_INDEX
from blip2.pipelines.base import as_list, check_image_index, check_texts, check_tokens
from blip2.pipelines.images import Images, cat_padded
from blip2.pipelines.scoring import Rows, Scores, ScoringPipeline, TextLengthError

QUESTION_TEMPLATE = "Question: {} Answer:"
"""Default prompt of questions for a decoder-only LLM (§4.1)."""
SHORT_QUESTION_TEMPLATE = "Question: {} Short answer:"
"""Default prompt of questions for an encoder-decoder LLM (§4.1)."""
NO_LIMIT = 2**31
"""A maximum number of tokens that truncates no text."""


def check_prompts(prompts: Sequence[object]) -> None:
    """Raise an InputError if a prompt is not a text, or contains an image placeholder."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(
                f"a prompt is a {type(prompt).__name__}, {str(prompt)[:80]!r}, expected a str: give a text"
            )
        if IMAGE_TOKEN in prompt:
            raise InputError(f"the prompt {prompt!r} contains {IMAGE_TOKEN}: remove {IMAGE_TOKEN}, because the image is"
                             " placed first automatically")  # fmt: skip


class LikelihoodPipeline(ScoringPipeline[GenerationModel]):
    """A stage-2 model as a judge of texts: prompts, visual prompts, and the likelihoods of texts that follow them."""

    score_names = ("lm", "pmi")

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
    def log_likelihood(
        self,
        images: Images,
        prompts: Sequence[str],
        texts: Sequence[str],
        image_index: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "N"]:
        """Return the log-probability (natural logarithm) of each text with its end token, given image and prompt.

        Texts that have image, prompt and question in common share them: the LLM reads the prompt once.

        Args:
            images: images.
            prompts: the prompt of each text.
            texts: texts to score; they are neither normalized nor truncated.
            image_index: index in `images` of the image of each text. None: one image per text.
            questions: the question in each prompt; see :meth:`generate`.

        Raises:
            InputError: there are no images or texts, the lists differ in length, an index in `image_index` is
                out of range, a prompt contains an image placeholder, or a text is too long for the LLM.
        """
        return self._log_likelihoods(self.encode_images(images), prompts, texts, image_index, questions)[0]

    def _log_likelihoods(
        self,
        features: Float[Tensor, "I P E"],
        prompts: Sequence[str],
        texts: Sequence[str],
        image_index: Sequence[int] | None,
        questions: Sequence[str] | None,
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """Return the log-probability and the number of tokens of each text; see :meth:`log_likelihood`."""
        indices = list(range(len(texts)) if image_index is None else image_index)
        check_prompts(prompts)
        self._check_lengths(len(features), prompts, texts, indices, questions, image_index is not None)
        asked = [""] * len(texts) if questions is None else questions
        # The texts of one row have image, prompt and question in common.
        rows: dict[tuple[int, str, str], int] = {}
        row_of = [rows.setdefault(key, len(rows)) for key in zip(indices, prompts, asked, strict=True)]
        row_images = torch.tensor([image for image, _, _ in rows])
        row_questions = None if questions is None else [question for _, _, question in rows]
        encoded = self._encode_questions(row_questions, [prompt for _, prompt, _ in rows])
        visual = self._visual_prompts(features, encoded, row_images)
        row_visual = torch.arange(len(rows)) if encoded is not None else row_images  # a visual prompt per question
        visual_index = row_visual[torch.tensor(row_of)]
        if len(rows) < len(texts) and self.model.language.shares_prompts:
            return self._continue_prompts(visual, visual_index, prompts, texts)
        values: list[Tensor] = []
        num_tokens: list[Tensor] = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self._continuations(texts[part], prompts[part])
            self._check_scored_length(batch[0].shape[1], batch[2].shape[1])
            states, labels = self.model.language.hidden_states(visual[visual_index[part].to(self.device)], *batch)
            log_probs = self.model.language.lm_head(states).float().log_softmax(dim=-1)
            token = log_probs.gather(1, labels[:, None]).squeeze(1)
            num_tokens.append((batch[2] != IGNORE_INDEX).sum(dim=1))
            values += [each.sum() for each in token.split(num_tokens[-1].tolist())]
        return torch.stack(values), torch.cat(num_tokens)

    def _continue_prompts(
        self,
        visual: Float[Tensor, "V Q L"],
        visual_index: Int[Tensor, "N"],
        prompts: Sequence[str],
        texts: Sequence[str],
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """Return the log-probability and the number of tokens of each text. The LLM reads each prompt once.

        Args:
            visual: visual prompts.
            visual_index: the visual prompt of each text.
            prompts: the prompt of each text.
            texts: the texts.
        """
        ids, mask, labels = (each.cpu() for each in self._continuations(texts, prompts))
        self._check_scored_length(ids.shape[1], labels.shape[1])
        num_tokens = (labels != IGNORE_INDEX).sum(dim=1)
        is_joint = not self.model.language.is_encoder_decoder  # the ids contain prompt and text
        lengths = (mask.sum(dim=1) - num_tokens * is_joint).tolist()
        # Whether two texts have the tokens of their prompt in common depends on the tokenizer.
        shared: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, (image, row, length) in enumerate(zip(visual_index.tolist(), ids.tolist(), lengths, strict=True)):
            shared.setdefault((image, tuple(row[:length])), []).append(i)
        order = sorted(shared, key=lambda key: len(key[1]))  # prompts of similar length together
        targets = [row[row != IGNORE_INDEX] for row in labels]
        values = torch.empty(len(texts), device=self.device)
        for start in range(0, len(order), self.batch_size):
            keys = order[start : start + self.batch_size]
            chosen = [i for key in keys for i in shared[key]]
            prompt_index = [number for number, key in enumerate(keys) for _ in shared[key]]
            used, image = torch.tensor([image for image, _ in keys]).unique(return_inverse=True)
            prompt_lengths = torch.tensor([len(tokens) for _, tokens in keys])
            prompt_ids = pad([tokens for _, tokens in keys], 0)
            values[torch.tensor(chosen, device=self.device)] = self.model.language.continuation_log_probs(
                visual[used.to(self.device)],
                prompt_ids.to(self.device),
                (torch.arange(prompt_ids.shape[1]) < prompt_lengths[:, None]).to(self.device),
                image.to(self.device),
                pad_sequence([targets[i] for i in chosen], True, IGNORE_INDEX).to(self.device),
                torch.tensor(prompt_index, device=self.device),
                4 * self.batch_size,
            )
        return values, num_tokens.to(self.device)

    def _check_lengths(
        self,
        num_images: int,
        prompts: Sequence[str],
        texts: Sequence[str],
        image_index: Sequence[int],
        questions: Sequence[str] | None,
        has_index: bool,
    ) -> None:
        """Check the lists of :meth:`log_likelihood`.

        Raises:
            InputError: there are no texts, the lists differ in length, or an index is out of range.
        """
        if not texts:
            raise InputError("no text was given: give at least one")
        lists = {"prompts": prompts, "questions": texts if questions is None else questions}
        lists |= {"entries in image_index": image_index} if has_index else {"images": range(num_images)}
        for what, values in lists.items():
            if len(values) != len(texts):
                raise InputError(f"there are {len(texts)} texts and {len(values)} {what}: give one per text")
        check_image_index(image_index, num_images)

    def _check_scored_length(self, num_tokens: int, num_labels: int) -> None:
        """Check that the LLM has positions for what it reads.

        Args:
            num_tokens: tokens of prompt and text, or of the prompt alone for an encoder-decoder.
            num_labels: tokens of the text, which the decoder of an encoder-decoder reads.
        """
        language, queries = self.model.language, self.model.max_visual_tokens
        needed = max(queries + num_tokens, num_labels if language.is_encoder_decoder else 0)
        if language.max_position_embeddings is not None and needed > language.max_position_embeddings:
            raise TextLengthError(
                f"a prompt with its text needs {needed} of the LLM's {language.max_position_embeddings} positions,"
                f" {queries} of them for the image: shorten the prompt or the text"
            )

    # -- scores --------------------------------------------------------------------------------------------------------

    @property
    def class_template(self) -> str:
        """The default template of :meth:`classify`, which continues the model's own prompt."""
        return "a {}"

    def _make_rows(
        self, images: Images, prompt: str | Sequence[str] | None, questions: str | Sequence[str] | None
    ) -> Rows:
        assert self.config.language is not None
        is_template = isinstance(prompt, str) and QUESTION_PLACEHOLDER in prompt
        if prompt is not None and questions is not None and not is_template:
            raise InputError("found both prompt and questions, expected one of them: leave out prompt, because the"
                             " model's own prompt contains the question, or put {} into it in the place of the"
                             " question")  # fmt: skip
        if prompt is None and questions is None and self.config.language.prompt_has_question:
            raise InputError(f"{self.path} was trained to answer questions: give questions, or a prompt that the texts"
                             " continue")  # fmt: skip
        features = self.encode_images(images)
        listed = None if questions is None else check_texts(questions, "question")
        own = self.config.language.prompt if prompt is None else prompt
        prompts = as_list(own)
        if not prompts:
            raise InputError("no prompt was given: give at least one, or leave out prompt")
        if listed is not None:
            prompts = self.format_questions(listed, prompt if isinstance(prompt, str) else None)
        num_rows = len(prompts) if len(features) == 1 else len(features)
        if len(prompts) == 1:
            prompts, listed = prompts * num_rows, listed and listed * num_rows
        if len(prompts) != num_rows:
            what = "prompts" if listed is None else "questions"
            raise InputError(
                f"there are {len(features)} images and {len(prompts)} {what}: give one per image, one for all"
                " images, or a single image"
            )
        return Rows(features, [0] * num_rows if len(features) == 1 else list(range(num_rows)), prompts, listed)

    def _score(
        self,
        by: ScoreName,
        rows: Rows,
        texts: list[str],
        pairs: tuple[Int[Tensor, "N"], Int[Tensor, "N"]] | None,
    ) -> Scores:
        if rows.questions is None:  # as in training, where captions are normalized and answers are not
            texts = normalize_captions(texts, self.config.text_normalization)
        shape = (len(rows), len(texts)) if pairs is None else (len(pairs[0]),)
        row_index, text_index = (
            (torch.arange(len(rows)).repeat_interleave(len(texts)), torch.arange(len(texts)).repeat(len(rows)))
            if pairs is None
            else pairs
        )
        values, num_tokens = self._score_pairs(rows, texts, row_index.tolist(), text_index.tolist())
        if by == "pmi":
            values = values - self._score_without_image(rows, texts, row_index.tolist(), text_index.tolist())
        return Scores(values.view(shape), num_tokens.view(shape))

    def _score_pairs(
        self, rows: Rows, texts: Sequence[str], row_index: Sequence[int], text_index: Sequence[int]
    ) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """Return log-likelihood and number of tokens of each pair of a row and a text."""
        assert rows.prompts is not None
        return self._log_likelihoods(
            rows.features,
            [rows.prompts[i] for i in row_index],
            [texts[i] for i in text_index],
            [rows.image_index[i] for i in row_index],
            None if rows.questions is None else [rows.questions[i] for i in row_index],
        )

    def _score_without_image(
        self, rows: Rows, texts: Sequence[str], row_index: Sequence[int], text_index: Sequence[int]
    ) -> Float[Tensor, "N"]:
        """Return the log-likelihood of each pair with a blank image in place of the row's image.

        Each text is scored once per prompt, however many images have the prompt.
        """
        assert rows.prompts is not None
        blank = self.encode_pixels(blank_input(self.model.vision.input_format))
        asked = [""] * len(rows) if rows.questions is None else rows.questions
        pairs = [(rows.prompts[i], asked[i], texts[t]) for i, t in zip(row_index, text_index, strict=True)]
        unique = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        prompts, questions, scored = (list(each) for each in zip(*unique, strict=True))
        values, _ = self._log_likelihoods(
            blank, prompts, scored, [0] * len(unique), None if rows.questions is None else questions
        )
        return values[torch.tensor([unique[pair] for pair in pairs], device=values.device)]

    def _encode_questions(self, questions: Sequence[str] | None, prompts: Sequence[str]) -> Questions | None:
        """Return the tokens that the Q-Former reads: the normalized questions, None without questions; or the prompts.

        ``qformer.text_input`` in the model's config says which.
        """
        if self.config.qformer.text_input == "prompt":
            encoded = encode_questions(self.qformer_tokenizer, prompts)
        elif questions is None:
            return None
        else:
            texts = normalize_questions(questions, self.config.text_normalization)
            encoded = encode_questions(self.qformer_tokenizer, texts)
        if encoded is not None:
            check_tokens(encoded.ids, self.config.qformer)
        return encoded

    def _continuations(
        self, texts: Sequence[str], prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"]]:
        """Return token ids, attention mask and labels of prompts with texts, as in training.

        For a decoder-only LLM, the ids contain prompt and text; for an encoder-decoder LLM, the prompt alone, so that
        the length U of the labels differs from T.
        """
        check_prompts(prompts)
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
        return self._map_rows(self.model.visual_prompt, features, questions, image_index, VISUAL_PADDING)

    def _map_rows(
        self,
        function: Callable[..., Tensor],
        features: Float[Tensor, "I P E"],
        questions: Questions | None,
        image_index: Int[Tensor, "B"],
        padding: float = 0.0,
    ) -> Float[Tensor, "N ..."]:
        """Apply a method of the model, which takes features and questions, to all images or questions in batches.

        `padding` fills up results that are smaller than others.
        """
        if questions is None:
            return cat_padded([function(part) for part in features.split(self.batch_size)], padding)
        parts = []
        for rows in torch.arange(len(image_index)).split(self.batch_size):
            used, image = image_index[rows].unique(return_inverse=True)
            words = int(questions.mask[rows].sum(dim=1).max())
            part = Questions(*(each[rows, :words].to(self.device) for each in questions))
            parts.append(function(features[used.to(self.device)], part, image.to(self.device)))
        return cat_padded(parts, padding)
