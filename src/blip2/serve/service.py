"""The parts that all endpoints share: the engine, the models, and the reading of images."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from jaxtyping import Float
from torch import Tensor

from blip2.serve.engine import Engine
from blip2.serve.errors import ApiError
from blip2.serve.images import ImageReader
from blip2.serve.models import Stage1Model, Stage2Model
from blip2.serve.options import ServeOptions
from blip2.serve.schemas import ImageObject, ImagePart, Item, TextObject, TextPart

if TYPE_CHECKING:
    from blip2.search.library import Library

M = TypeVar("M", Stage1Model, Stage2Model)


@dataclass(frozen=True)
class Service:
    """The parts of a running service."""

    engine: Engine
    models: dict[str, Stage1Model | Stage2Model]
    images: ImageReader
    options: ServeOptions
    library: Library | None = None

    def find(self, name: str, kind: type[M], request: Request) -> M:
        """Return a model by its name, and note the name for the log.

        Raises:
            ApiError: there is no such model, or it is of the other stage.
        """
        model = self.find_any(name, request)
        if not isinstance(model, kind):
            fitting = [each for each, other in self.models.items() if isinstance(other, kind)]
            stage = "generation" if kind is Stage2Model else "representation"
            advice = f"use {' or '.join(fitting)}" if fitting else f"serve a model of stage {stage}"
            raise ApiError(400, f"the model {name} cannot do this: {advice}", "model", "wrong_model")
        return model

    def find_any(self, name: str, request: Request) -> Stage1Model | Stage2Model:
        """Return a model of either stage by its name; see :meth:`find`."""
        if name not in self.models:
            known = ", ".join(self.models) or "none"
            raise ApiError(
                404, f"the model {name[:80]!r} does not exist here, expected one of: {known}", "model",
                "model_not_found",
            )  # fmt: skip
        request.state.log["model"] = name
        return self.models[name]

    async def encode(
        self, model: Stage1Model | Stage2Model, urls: Sequence[str], param: str
    ) -> list[Float[Tensor, "P E"]]:
        """Return the features of images by their URLs.

        Args:
            model: the model that reads them.
            urls: data URLs, or URLs on hosts that are allowed.
            param: the field of the request with the images.

        Raises:
            ApiError: an image cannot be read, or there are too many.
        """
        limit = self.options.max_images
        if len(urls) > limit:
            raise ApiError(400, f"there are {len(urls)} images, expected at most {limit}: send fewer", param)
        distinct = list(dict.fromkeys(urls))
        reads = [asyncio.ensure_future(self.images.read(url, model.preprocess)) for url in distinct]
        try:
            pixels = await asyncio.gather(*reads)
        finally:  # if an image is refused, the others must not be read on: the gate no longer counts the request
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
        features = dict(zip(distinct, await self.engine.submit(model.encode, pixels), strict=True))
        return [features[url] for url in urls]


def image_url(item: Item) -> str | None:
    """Return the image URL of an item; None for a text."""
    if isinstance(item, ImageObject):
        return item.image
    return item.image_url.url if isinstance(item, ImagePart) else None


def text_of(item: Item, param: str) -> str | None:
    """Return the text of an item; None for an image.

    Raises:
        ApiError: the text is blank.
    """
    text = item.text if isinstance(item, TextObject | TextPart) else item if isinstance(item, str) else None
    if text is not None and not text.strip():
        raise ApiError(400, f"{param} contains the text {text[:20]!r}, expected words: write them, or leave it out",
                       param)  # fmt: skip
    return text
