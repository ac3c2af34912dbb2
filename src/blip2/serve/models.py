"""The models of the service, as functions of lists that an engine can batch over requests.

Legend: Q queries, P image tokens, C contrastive width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from blip2.data.images import preprocess
from blip2.decoding.kv_cache import PromptBatch
from blip2.decoding.options import Decoding
from blip2.pipelines import Candidate, GenerationPipeline, RepresentationPipeline
from blip2.serve.errors import ApiError

P = TypeVar("P", RepresentationPipeline, GenerationPipeline)


class _Model(Generic[P]):
    """The functions of the models of both stages.

    Args:
        name: the name of the model in requests.
        pipeline: the model.

    Raises:
        InputError: the model does not read images.
    """

    def __init__(self, name: str, pipeline: P) -> None:
        self._preprocessing = pipeline.model.vision.preprocessing
        self.name, self.num_query_tokens = name, pipeline.config.qformer.num_query_tokens
        self.pipeline = pipeline

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Return an image as the image encoder reads it."""
        return preprocess(image, self._preprocessing)

    def encode(self, pixels: list[Float[Tensor, "3 H W"]]) -> list[Float[Tensor, "P E"]]:
        """Return the features of preprocessed images."""
        return list(self.pipeline.encode_pixels(torch.stack(pixels)))

    def attention(self, pairs: list[tuple[Float[Tensor, "P E"], str | None]]) -> list[Float[Tensor, "Q P"]]:
        """Return the attention of the queries over the image tokens in the last cross-attention.

        Args:
            pairs: features of images, each with a text that the queries read as well, or None.
        """
        return [self.pipeline.attention_maps(features[None], text)[0, -1].cpu() for features, text in pairs]


def count_tokens(pipeline: RepresentationPipeline | GenerationPipeline, text: str) -> int:
    """Return the number of tokens of a text."""
    return len(pipeline.tokenizer(text, verbose=False)["input_ids"])


def check_length(pipeline: RepresentationPipeline, text: str, param: str) -> int:
    """Return the number of tokens of a text, which is in the field `param` of a request.

    Raises:
        ApiError: a stage-1 model would truncate the text.
    """
    limit = min(pipeline.config.qformer.max_position_embeddings, 2 * pipeline.config.max_length)
    count = count_tokens(pipeline, text)
    if count > limit:
        raise ApiError(
            400, f"a text has {count} tokens, expected at most {limit}: shorten it", param, "context_length_exceeded"
        )
    return count


class Stage1Model(_Model[RepresentationPipeline]):
    """A stage-1 model."""

    def embed_images(self, features: list[Float[Tensor, "P E"]]) -> list[Float[Tensor, "Q C"]]:
        """Return the unit vectors of the queries of images."""
        return list(self.pipeline.embed_images(torch.stack(features)).float().cpu())

    def embed_texts(self, texts: list[str]) -> list[Float[Tensor, "C"]]:
        """Return the unit vectors of texts."""
        return list(self.pipeline.embed_texts(texts).float().cpu())

    def match(self, pairs: list[tuple[Float[Tensor, "P E"], str]]) -> list[float]:
        """Return the probability that image and text match (ITM) of each pair of features and a text."""
        images = {id(features): features for features, _ in pairs}
        place = {key: number for number, key in enumerate(images)}
        scores = self.pipeline.score(
            torch.stack(list(images.values())),
            [text for _, text in pairs],
            "itm",
            image_index=[place[id(features)] for features, _ in pairs],
        )
        return scores.values.tolist()


class Conversation(NamedTuple):
    """Messages whose images are features, and how their answer is generated."""

    messages: Sequence[Mapping[str, Any]]
    decoding: Decoding


class Stage2Model(_Model[GenerationPipeline]):
    """A stage-2 model."""

    def chat_prompts(self, conversations: list[Conversation]) -> list[PromptBatch]:
        """Return what the LLM reads before its answer to the last message of each conversation."""
        return [
            self.pipeline.chat(messages=messages, decoding=decoding).encode_prompt()
            for messages, decoding in conversations
        ]

    def caption_prompts(self, images: list[tuple[Float[Tensor, "P E"], Decoding]]) -> list[PromptBatch]:
        """Return what the LLM reads before it captions each image."""
        return [self.pipeline.encode_prompt(features[None], decoding=decoding) for features, decoding in images]

    def choose(self, questions: list[tuple[Float[Tensor, "P E"], str, tuple[str, ...]]]) -> list[list[Candidate]]:
        """Rank candidate answers to questions.

        Args:
            questions: features of an image, a question about it, and the candidates.
        """
        return [
            self.pipeline.rank(features[None], candidates, question)[0] for features, question, candidates in questions
        ]


def itc(query: Float[Tensor, "... C"], vectors: Float[Tensor, "... C"]) -> float:
    """Return the similarity of a text [C] or an image [Q, C] to another one.

    For a text and an image it is the maximum cosine over the queries of the image; for two images, the mean of this
    maximum over the queries of the first.
    """
    if query.ndim == 2 and vectors.ndim == 1:
        query, vectors = vectors, query
    cosines = torch.atleast_2d(query) @ torch.atleast_2d(vectors).T
    return float(cosines.amax(dim=1).mean())
