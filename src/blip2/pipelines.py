"""Use trained models: caption images, answer questions, embed and compare images and texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import IOBase
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2 import checkpoint
from blip2.builder import Built, build, choose_device
from blip2.config import IMAGE_TOKEN, ModelConfig, Precision, Stage
from blip2.data.collate import (
    check_unicode,
    encode_continuations,
    encode_prompts,
    encode_questions,
    encode_texts,
    format_prompts,
    normalize_captions,
    normalize_questions,
    pad,
)
from blip2.data.images import ImageLike, preprocess, read_image
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationModel, Questions
from blip2.model.losses import IGNORE_INDEX, image_text_similarity
from blip2.model.representation import RepresentationModel

log = logging.getLogger("blip2")

Model = TypeVar("Model", RepresentationModel, GenerationModel)
Images = ImageLike | Iterable[ImageLike]
QUESTION_TEMPLATE = "Question: {} Answer:"
"""Default prompt of questions for a decoder-only LLM (§4.1)."""
NO_LIMIT = 2**31
"""A maximum number of tokens that truncates no text."""
SHORT_QUESTION_TEMPLATE = "Question: {} Short answer:"
"""Default prompt of questions for an encoder-decoder LLM (§4.1)."""


def load(
    path: str | Path,
    device: str | None = None,
    dtype: Precision | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    stage: Stage | None = None,
) -> RepresentationPipeline | GenerationPipeline:
    """Load a checkpoint of ``blip2 train``, transformers or LAVIS.

    Args:
        path: folder of a run (its last checkpoint is loaded) or of a checkpoint; folder or hub name of transformers'
            ``Blip2ForConditionalGeneration`` or ``Blip2ForImageTextRetrieval``; or a ``.pth`` file of LAVIS.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. None: a GPU if there is one.
        dtype: data type of the image encoder and the LLM: ``fp32``, ``bf16`` or ``fp16``. None: the dtype in the
            model's config; if the config sets none, bf16 on a CUDA GPU and fp32 on other devices.
        overrides: new values of keys of the model's config (``{"vision.image_size": 364}``), and values that a
            ``.pth`` file does not contain (``{"vision.name": "eva_vit_g.pth", "language.name": "facebook/opt-2.7b"}``).
        stage: the stage to load from a checkpoint that contains both stages, ``representation`` or ``generation``.
            None: the stage in the config of the checkpoint.

    Returns:
        A :class:`RepresentationPipeline` for stage 1, a :class:`GenerationPipeline` for stage 2.

    Raises:
        InputError: there is no checkpoint at `path`, or it is damaged, not a BLIP-2 or not of `stage`; a frozen part
            cannot be loaded; or the device does not exist.
    """
    found = checkpoint.open_checkpoint(str(path), overrides).as_stage(stage)
    log.info("%s: %s", found.name, found.description)
    config = found.config
    if found.missing_prefixes and config.stage == "representation":
        missing = " and no ".join(prefix.rstrip(".") for prefix in found.missing_prefixes)
        log.info("the checkpoint has no %s: these weights are random", missing)
    if dtype is not None:
        vision = replace(config.vision, dtype=dtype)
        language = None if config.language is None else replace(config.language, dtype=dtype)
        config = replace(config, vision=vision, language=language)
    built = build(config, choose_device(device), found)
    checkpoint.load_weights(found, built.model)
    built.model.eval()
    return make_pipeline(built, config, Path(found.name))


def make_pipeline(built: Built, config: ModelConfig, path: Path) -> RepresentationPipeline | GenerationPipeline:
    """Wrap a model in the pipeline of its stage. The model is not copied, moved or switched to evaluation mode.

    Args:
        built: the model and its tokenizers.
        config: the config of the model.
        path: path or name of the checkpoint, for error messages.
    """
    if isinstance(built.model, RepresentationModel):
        return RepresentationPipeline(built.model, built.tokenizer, config, path)
    assert built.eos_token_id is not None
    return GenerationPipeline(built.model, built.tokenizer, config, path, built.eos_token_id, built.question_tokenizer)


class Pipeline(Generic[Model]):
    """Base class of the pipelines of both stages.

    Every method takes one image or a list of images. An image is a path, bytes, a PIL image or an array. In the shapes,
    I is the number of images, T the number of texts, P the number of image tokens, E the width of the image encoder, Q
    the number of queries and C the contrastive width.
    """

    batch_size = 16
    """Number of images, or of image-text pairs, per forward pass."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, path: Path) -> None:
        self.model, self.tokenizer, self.config, self.path = model, tokenizer, config, path

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.image_norm.weight.device

    def encode_images(self, images: Images) -> Float[Tensor, "I P E"]:
        """Return the features that the frozen image encoder computes for images.

        Every method accepts these features in place of images, and encodes nothing then. Features that are given as
        `images` are returned unchanged.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        if isinstance(images, Tensor) and images.ndim == 3 and images.shape[1:] == self._feature_shape:
            return images
        pixels = [preprocess(read_image(image), self.model.vision.preprocessing) for image in as_list(images)]
        if not pixels:
            raise InputError("no image was given: give at least one")
        return self.encode_pixels(torch.stack(pixels))

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I P E"]:
        """Return the features that the frozen image encoder computes for preprocessed images.

        Args:
            pixels: images of the encoder's size H x W, as :func:`blip2.data.images.preprocess` returns them.
        """
        return torch.cat([self.model.vision.encode(part.to(self.device)) for part in pixels.split(self.batch_size)])

    @property
    def _feature_shape(self) -> tuple[int, int]:
        return self.model.vision.num_tokens, self.model.vision.hidden_size

    def _refuse(self, task: str, stage: str) -> NoReturn:
        raise InputError(
            f"{self.path} is of stage {self.config.stage}, which cannot {task}: load a model of stage {stage}"
        )

    # Each stage overrides the tasks it supports.

    def caption(
        self, images: Images, prompt: str | Sequence[str] | None = None, decoding: Decoding | None = None
    ) -> list[str]:
        """Raise an InputError; only stage-2 models support this, see :meth:`GenerationPipeline.caption`."""
        self._refuse("write captions", "generation")

    def answer(self, images: Images, questions: str | Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """Raise an InputError; only stage-2 models support this, see :meth:`GenerationPipeline.answer`."""
        self._refuse("answer questions", "generation")

    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """Raise an InputError; only stage-1 models support this, see :meth:`RepresentationPipeline.embed_images`."""
        self._refuse("embed images", "representation")

    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Raise an InputError; only stage-1 models support this, see :meth:`RepresentationPipeline.embed_texts`."""
        self._refuse("embed texts", "representation")

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Raise an InputError; only stage-1 models support this, see :meth:`RepresentationPipeline.similarity`."""
        self._refuse("compare images and texts", "representation")

    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Raise an InputError; only stage-1 models support this, see :meth:`RepresentationPipeline.match`."""
        self._refuse("match images and texts", "representation")


class RepresentationPipeline(Pipeline[RepresentationModel]):
    """A stage-1 model, which compares images and texts."""

    @torch.no_grad()
    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """Embed images in the contrastive space (§3.2, ITC): one unit vector per query.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        features = self.encode_images(images)
        parts = [
            self.model.embed_images(self.model.build_image_memory(part)) for part in features.split(self.batch_size)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Embed texts in the contrastive space (§3.2, ITC): one unit vector per text.

        Texts are normalized and truncated as in :meth:`tokenize`.

        Raises:
            InputError: there are no texts, or a text is blank.
        """
        parts = []
        listed = check_texts(texts, "text")
        for start in range(0, len(listed), 4 * self.batch_size):
            parts.append(self.model.embed_texts(*self.tokenize(listed[start : start + 4 * self.batch_size])))
        return torch.cat(parts)

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Return the cosine similarity, in [-1, 1], of every image to every text (§3.2, ITC).

        The similarity of a pair is the maximum over the queries of the image.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        return image_text_similarity(self.embed_images(images), self.embed_texts(texts))

    @torch.no_grad()
    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Return the probability in [0, 1] that an image and a text match, for every image and text (§3.2, ITM).

        This method is slower and more accurate than :meth:`similarity`, because the Q-Former processes every pair.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        features, listed = self.encode_images(images), check_texts(texts, "text")
        candidates = torch.arange(len(listed)).expand(len(features), -1)
        return self.match_candidates(features, listed, candidates).softmax(dim=-1)[..., 1]

    @torch.no_grad()
    def match_candidates(
        self, images: Images, texts: Sequence[str], candidates: Int[Tensor, "I K"]
    ) -> Float[Tensor, "I K 2"]:
        """Return the ITM logits (not matched, matched) of each image with K texts of its own, for re-ranking (§4.4).

        Args:
            images: images.
            texts: all texts.
            candidates: for each image, the indices of its K texts in `texts`.
        """
        features = self.encode_images(images)
        return self.model.match_candidates(
            features, *self.tokenize(texts), candidates.to(self.device), 4 * self.batch_size
        )

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "T L"], Bool[Tensor, "T L"]]:
        """Return token ids and attention mask (True for tokens, False for padding) of texts for the Q-Former.

        Texts are normalized with the model's ``text_normalization``. A text is truncated to twice the model's
        ``max_length`` or to the maximum length of the Q-Former, whichever is smaller. L is the length of the longest
        text in tokens.
        """
        texts = normalize_captions(texts, self.config.text_normalization)
        limit = min(self.config.qformer.max_position_embeddings, 2 * self.config.max_length)
        ids, mask, _ = encode_texts(self.tokenizer, texts, limit)
        return ids.to(self.device), mask.to(self.device)


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


def as_list(images: Images) -> list[ImageLike]:
    """Return `images`, which is one image or several images, as a list."""
    if isinstance(images, Tensor) or hasattr(images, "ndim"):
        return list(images) if images.ndim == 4 else [images]  # pyright: ignore
    one = isinstance(images, str | bytes | bytearray | memoryview | IOBase | Mapping) or not isinstance(
        images, Iterable
    )
    return [images] if one else list(images)  # pyright: ignore


def check_texts(texts: str | Sequence[str], kind: str) -> list[str]:
    """Return one text, or several texts, as a list, after checking that no text is blank.

    Args:
        texts: a text or several texts.
        kind: what a text is, such as ``question``, for error messages.

    Raises:
        InputError: a text is blank, or there are no texts.
    """
    listed = [texts] if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else list(texts)
    if not listed:
        raise InputError(f"no {kind} was given: give at least one")
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{kind} {number} of {len(listed)} is {text!r}, expected words: correct or remove it")
    return listed
