"""The base class of the pipelines, and how images and texts are given to a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeGuard, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2.backbones.features import cat_tokens, check_padded
from blip2.config import IMAGE_TOKEN, ModelConfig, QFormerConfig
from blip2.data.arrays import read_input
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel
from blip2.pipelines.images import Images, ImageStream, OnError

Model = TypeVar("Model", RepresentationModel, GenerationModel)
T = TypeVar("T")


class Pipeline(Generic[Model]):
    """Base class of the pipelines of both stages.

    Every method takes one image or any iterable of images: a list, a generator, a data set or one of its columns. An
    image is a path, bytes, a PIL image or an array. Images are decoded in threads, a few batches ahead of the model,
    and only the images and the features of these batches are in memory. Methods with the argument `on_error` can go on
    after an image that cannot be decoded: with ``raise`` they raise its error, with ``skip`` they leave the image out
    and log a warning, and with ``return`` they return the error in place of the result. A method whose result is a
    tensor then returns a list, with a tensor or an error for each image.

    In the shapes, I is the number of images, T the number of texts, N the number of pairs of an image and a text, P the
    number of image tokens, E the width of the image encoder, Q the number of queries, D the width of the Q-Former and C
    the contrastive width.
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

        Every method accepts these features in place of images, on any device, and encodes nothing then. Features that
        are given as `images` are returned on the device of the model.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        if self._is_features(images):
            return images.to(self.device)
        return cat_tokens([features for _, features in self._stream(images, label="encode")])

    def _stream(self, images: Images, on_error: OnError = "raise", label: str = "images") -> ImageStream:
        """Return images as batches of features on the device of the model."""
        if self._is_features(images):
            return ImageStream.from_features(images, self.device, self.batch_size, on_error)
        return ImageStream(images, self._load_image, self.encode_pixels, self.batch_size, on_error, label)

    def _load_image(self, image: Any) -> Tensor:
        return read_input(image, self.model.vision.input_format)

    def _is_features(self, images: Any) -> TypeGuard[Tensor]:
        if not isinstance(images, Tensor) or images.ndim != 3:
            return False
        if self.model.vision.has_padding and images.shape[2] == self.model.vision.hidden_size:
            check_padded(images)
            return True
        if images.shape[1:] != self._feature_shape:
            return False
        if not len(images):
            return True
        extremes = torch.stack(torch.aminmax(images.detach()))  # both are NaN if any value is
        if not images.is_floating_point() or not extremes.isfinite().all():
            raise InputError(
                f"the features are of type {str(images.dtype).removeprefix('torch.')} and range from"
                f" {extremes.min().item():g} to {extremes.max().item():g}, expected finite floating-point numbers:"
                " encode the images again"
            )
        return True

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "I C H W"]) -> Float[Tensor, "I P E"]:
        """Return the features that the frozen image encoder computes for preprocessed images.

        Args:
            pixels: images of the encoder's size H x W, as :func:`blip2.data.images.preprocess` returns them; or arrays
                of features [I, 1, P, E], as :func:`blip2.data.arrays.stack_inputs` returns them.
        """
        return cat_tokens([self.model.vision.encode(part.to(self.device)) for part in pixels.split(self.batch_size)])

    @property
    def _feature_shape(self) -> tuple[int, int]:
        return self.model.vision.num_tokens, self.model.vision.hidden_size

    def _refuse(self, task: str, stage: str) -> NoReturn:
        raise InputError(
            f"{self.path} is of stage {self.config.stage}, which cannot {task}: load a model of stage {stage}"
        )

    def _temperature(self, name: str) -> float | None:
        """Return a temperature of the model's calibration by its name; None if the model is not calibrated."""
        return getattr(self.config.calibration, name, None)

    # Each stage overrides the tasks it supports.

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str] | Sequence[Sequence[str]],
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.answer`, for stage-2 models."""
        self._refuse("answer questions", "generation")

    def stream(
        self, image: Images, prompt: str | None = None, decoding: Decoding | None = None, *, question: str | None = None
    ) -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.stream`, for stage-2 models."""
        self._refuse("write text", "generation")

    def chat(
        self,
        images: Images | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        decoding: Decoding | None = None,
    ) -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.chat`, for stage-2 models."""
        self._refuse("talk about images", "generation")

    def explain(
        self, image: Images, text: str | Sequence[int], prompt: str | None = None, *, question: str | None = None
    ) -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.GenerationPipeline.explain`, for stage-2 models."""
        self._refuse("explain a text", "generation")

    def embed(self, images: Images, texts: str | Sequence[str], *, on_error: OnError = "raise") -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.embed`, for stage-1 models."""
        self._refuse("embed pairs of an image and a text", "representation")

    def embed_images(self, images: Images, *, on_error: OnError = "raise") -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.embed_images`, for stage-1 models."""
        self._refuse("embed images", "representation")

    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.embed_texts`, for stage-1 models."""
        self._refuse("embed texts", "representation")

    def similarity(
        self,
        images: Images | Float[Tensor, "I Q C"],
        texts: str | Sequence[str] | Float[Tensor, "T C"],
        *,
        on_error: OnError = "raise",
    ) -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.similarity`, for stage-1 models."""
        self._refuse("compare images and texts", "representation")

    def match(self, images: Images, texts: str | Sequence[str], *, on_error: OnError = "raise") -> Any:
        """Raise an InputError; see :meth:`~blip2.pipelines.RepresentationPipeline.match`, for stage-1 models."""
        self._refuse("match images and texts", "representation")


def texts_of_images(
    texts: Sequence[T], stream: ImageStream, kind: str, advice: str, one_image: bool = True, one_text: bool = True
) -> Callable[[int], Sequence[T]]:
    """Return the function that maps the position of an image to the texts of the image.

    Args:
        texts: a text per image; or a single text for all images, or all texts about a single image.
        stream: the images. Their number is checked now if it is known in advance, and otherwise when an image has no
            text; :func:`check_all_used` checks it at the end.
        kind: what a text is, such as ``question``, for error messages.
        advice: what to do if the numbers differ, for error messages.
        one_image: whether several texts may belong to a single image.
        one_text: whether a single text may belong to several images.

    Raises:
        InputError: the numbers of images and texts do not fit.
    """
    if stream.total == 0:
        raise InputError("no image was given: give at least one")
    if (one_text and len(texts) == 1) or (one_image and stream.total == 1):
        return lambda position: texts
    if stream.total is not None and stream.total != len(texts):
        raise InputError(f"there are {stream.total} images and {len(texts)} {kind}s: {advice}")

    def text(position: int) -> Sequence[T]:
        if position >= len(texts):
            raise InputError(f"there are more than {position} images and {len(texts)} {kind}s: {advice}")
        return texts[position : position + 1]

    return text


def check_all_used(
    texts: Sequence[object],
    texts_of_image: Callable[[int], Sequence[object]],
    stream: ImageStream,
    kind: str,
    advice: str,
) -> None:
    """Check, after all images were read, that every text had an image; see :func:`texts_of_images`."""
    if texts_of_image(0) is not texts and stream.num_read != len(texts):
        raise InputError(f"there are {stream.num_read} images and {len(texts)} {kind}s: {advice}")


def check_tokens(ids: Int[Tensor, "T L"], config: QFormerConfig) -> None:
    """Check that the Q-Former has an embedding for each token of its texts; on a GPU, a wrong index would end the
    process.

    Raises:
        InputError: a text contains an image placeholder, which is the only token that may have no embedding.
    """
    if ids.numel() and int(ids.max()) >= config.vocab_size:
        raise InputError(f"a text contains {IMAGE_TOKEN}, for which the Q-Former has no embedding: remove it")


def check_image_index(image_index: Iterable[Any], num_images: int) -> list[int]:
    """Return indices of images as a list, after checking each.

    Raises:
        InputError: an element is not an integer in [0, `num_images`).
    """
    indices = list(image_index)
    for index in indices:
        if not hasattr(index, "__index__") or not 0 <= index < num_images:
            raise InputError(
                f"image_index contains {index!r}, expected 0 to {num_images - 1}: give the index of one of the images"
            )
    return [int(index) for index in indices]


def as_list(texts: Any) -> list[Any]:
    """Return one text, or several texts, as a list, whose elements may still be anything but texts."""
    return [texts] if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else list(texts)


def check_texts(texts: str | Sequence[str], kind: str) -> list[str]:
    """Return one text, or several texts, as a list, after checking that no text is blank.

    Args:
        texts: a text or several texts.
        kind: what a text is, such as ``question``, for error messages.

    Raises:
        InputError: a text is blank, or there are no texts.
    """
    listed = as_list(texts)
    if not listed:
        raise InputError(f"no {kind} was given: give at least one")
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{kind} {number} of {len(listed)} is {text!r}, expected words: correct or remove it")
    return listed
