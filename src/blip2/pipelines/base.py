"""The base class of the pipelines, and how images and texts are given to a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import IOBase
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2.config import ModelConfig
from blip2.data.images import ImageLike, preprocess, read_image
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel

Model = TypeVar("Model", RepresentationModel, GenerationModel)
Images = ImageLike | Iterable[ImageLike]


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
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.caption`, for stage-2 models."""
        self._refuse("write captions", "generation")

    def answer(self, images: Images, questions: str | Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.answer`, for stage-2 models."""
        self._refuse("answer questions", "generation")

    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.embed_images`, for stage-1 models."""
        self._refuse("embed images", "representation")

    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.embed_texts`, for stage-1 models."""
        self._refuse("embed texts", "representation")

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.similarity`, for stage-1 models."""
        self._refuse("compare images and texts", "representation")

    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.match`, for stage-1 models."""
        self._refuse("match images and texts", "representation")


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
