"""What writes captions of pictures and what compares both: models of this project and of transformers.

Legend: N captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from blip2.build import choose_device, choose_dtype
from blip2.config import Precision
from blip2.errors import InputError
from blip2.inference import GenerationPipeline, RepresentationPipeline, load
from blip2.interop.formats import is_pickle
from blip2.model.decoding import Decoding, DrawnTokens
from blip2.model.pretrained import read_config, read_model, reading
from blip2.training.checkpoint import find


@runtime_checkable
class Captioner(Protocol):
    """Writes captions."""

    def write(self, images: Sequence[Image], copies: int, dice: Float[Tensor, "N longest"]) -> list[list[str]]:
        """`copies` captions of each picture.

        Args:
            dice: numbers in [0, 1) that decide what is sampled: see :func:`blip2.model.decoding.draw`.
        """
        ...


@runtime_checkable
class Ranker(Protocol):
    """Compares pictures and texts."""

    def rank(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The cosine of each picture with each of its own texts."""
        ...


def pin(name: str) -> str:
    """A model by the name of what it is at this moment: of a run that goes on, its last checkpoint."""
    return str(find(Path(name)).absolute()) if (Path(name) / "checkpoints").is_dir() else name


def open_captioner(
    name: str, decoding: Decoding, prompt: str | None, device: str | None, dtype: Precision | None
) -> Captioner:
    """A run of stage 2, a BLIP-2 of any format, or a captioning model of transformers (BLIP, GIT ...).

    Args:
        prompt: text that captions go on from; None: the model's own, if it has one.

    Raises:
        InputError: there is no such model, or it does not write captions of pictures.
    """
    kind = _foreign_type(name, "captioning model")
    if kind is not None:
        return TransformersCaptioner(name, decoding, prompt, device, dtype)
    pipeline = load(name, device, dtype, stage="generation")
    assert isinstance(pipeline, GenerationPipeline)
    return OwnCaptioner(pipeline, decoding, prompt)


def open_ranker(name: str, device: str | None, dtype: Precision | None) -> Ranker:
    """A run of stage 1, a BLIP-2 with its heads, or a dual encoder of transformers (CLIP, SigLIP ...).

    Raises:
        InputError: there is no such model, or it does not compare pictures and texts.
    """
    kind = _foreign_type(name, "image-text model")
    if kind is not None:
        return TransformersRanker(name, device, dtype)
    pipeline = load(name, device, dtype, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    return OwnRanker(pipeline)


def _foreign_type(name: str, what: str) -> str | None:
    """What kind of model of transformers a name stands for; None for BLIP-2 and this project's own."""
    path = Path(name)
    if is_pickle(name) or (path.is_dir() and not (path / "config.json").is_file()):
        return None
    kind = read_config(name, what).model_type
    return None if kind == "blip-2" else kind


class OwnCaptioner:
    """A model of stage 2."""

    def __init__(self, pipeline: GenerationPipeline, decoding: Decoding, prompt: str | None) -> None:
        language = pipeline.recipe.language
        assert language is not None
        if prompt is None and language.asks:
            raise InputError(f"{pipeline.path} was trained to answer questions: give a prompt that captions go on from")
        self._pipeline, self._decoding = pipeline, decoding
        self._prompt = language.prompt if prompt is None else prompt

    def write(self, images: Sequence[Image], copies: int, dice: Float[Tensor, "N longest"]) -> list[list[str]]:
        texts = self._pipeline.generate(list(images), [self._prompt] * len(images), self._decoding, copies, dice=dice)
        return [texts[at : at + copies] for at in range(0, len(texts), copies)]


class OwnRanker:
    """A model of stage 1, by its image-text contrastive part (§3.2)."""

    def __init__(self, pipeline: RepresentationPipeline) -> None:
        self._pipeline = pipeline

    def rank(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        pictures = self._pipeline.embed_images(list(images))
        words = self._pipeline.embed_texts([text for own in texts for text in own])
        parts = words.split([len(own) for own in texts])
        return [(own @ queries.T).amax(dim=-1).tolist() for own, queries in zip(parts, pictures, strict=True)]


class TransformersCaptioner:
    """Any ``AutoModelForImageTextToText`` that needs no chat template."""

    def __init__(
        self, name: str, decoding: Decoding, prompt: str | None, device: str | None, dtype: Precision | None
    ) -> None:
        place = choose_device(device)
        self._processor = _processor(name, "captioning model")
        if getattr(self._processor, "chat_template", None):
            raise InputError(
                f"{name} chats, which is not supported: give a captioning model such as BLIP, BLIP-2 or GIT"
            )
        auto, what = AutoModelForImageTextToText, "captioning model"
        self._model: Any = read_model(auto, name, what, choose_dtype(dtype, place), LEFT_OUT)[0].to(place).eval()
        self._decoding, self._prompt = decoding, prompt or ""

    @torch.no_grad()
    def write(self, images: Sequence[Image], copies: int, dice: Float[Tensor, "N longest"]) -> list[list[str]]:
        text = {"text": [self._prompt] * len(images)} if self._prompt else {}
        inputs = self._processor(images=list(images), **text, return_tensors="pt").to(self._model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        decoding, sampling = self._decoding, self._decoding.top_p is not None
        how: dict[str, Any] = {"do_sample": False, "num_beams": decoding.width(copies)}
        if sampling:
            # What is drawn is left alone by the settings.
            how = {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            how["logits_processor"] = [DrawnTokens(dice, decoding)]
        elif decoding.width(copies) > 1:
            how["length_penalty"] = decoding.length_penalty
        new = self._model.generate(
            **inputs, **how, num_return_sequences=copies, max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens,
        )  # fmt: skip
        texts = [self._own(text) for text in self._processor.batch_decode(new, skip_special_tokens=True)]
        return [texts[at : at + copies] for at in range(0, len(texts), copies)]

    def _own(self, text: str) -> str:
        """Without the prompt, which some models repeat."""
        text = text.strip()
        return text[len(self._prompt) :].strip() if text.lower().startswith(self._prompt.lower()) else text


class TransformersRanker:
    """Any dual encoder whose output has ``image_embeds`` and ``text_embeds``."""

    def __init__(self, name: str, device: str | None, dtype: Precision | None) -> None:
        place = choose_device(device)
        self._processor = _processor(name, "image-text model")
        what = "image-text model"
        self._model: Any = read_model(AutoModel, name, what, choose_dtype(dtype, place), LEFT_OUT)[0].to(place).eval()
        text = getattr(self._model.config, "text_config", None)
        self._longest = getattr(text, "max_position_embeddings", None)
        if self._longest is None or not hasattr(self._model, "get_text_features"):
            raise InputError(f"{name} does not compare pictures and texts: give a model such as CLIP or SigLIP")

    @torch.no_grad()
    def rank(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        listed = [text for own in texts for text in own]
        # SigLIP was trained on texts of one length.
        padding = "max_length" if self._model.config.model_type.startswith("siglip") else True
        inputs = self._processor(
            images=list(images), text=listed, return_tensors="pt", padding=padding, truncation=True,
            max_length=self._longest,
        ).to(self._model.device)  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        out = self._model(**inputs)
        pictures = torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
        words = torch.nn.functional.normalize(out.text_embeds.float(), dim=-1)
        parts = words.split([len(own) for own in texts])
        return [(own @ picture).tolist() for own, picture in zip(parts, pictures, strict=True)]


LEFT_OUT = r"position_ids|decoder\.(bias|weight)$"
"""Weights that files may lack: they are made, or are other weights."""


def _processor(name: str, what: str) -> Any:
    with reading(name, what, "preprocessor_config.json and tokenizer.json"):
        return AutoProcessor.from_pretrained(name)
