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

from blip2.backbones.pretrained import load_pretrained, read_config, read_model, reading
from blip2.builder import choose_device, choose_dtype
from blip2.checkpoint import FOLDER, find
from blip2.config import Precision
from blip2.decoding.search import Decoding, DrawnTokens
from blip2.errors import InputError
from blip2.interop.detect import is_pickle
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load


@runtime_checkable
class Captioner(Protocol):
    """Writes captions."""

    def write(self, images: Sequence[Image], copies: int, dice: Float[Tensor, "N longest"]) -> list[list[str]]:
        """`copies` captions of each picture.

        Args:
            dice: numbers in [0, 1) that decide what is sampled: see :func:`blip2.decoding.search.draw`.
        """
        ...


@runtime_checkable
class Ranker(Protocol):
    """Compares pictures and texts."""

    def rank(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The cosine of each picture with each of its own texts."""
        ...


def pin(name: str) -> str:
    """A model by what it is at this moment, wherever it is then read: of a run that goes on, its last checkpoint."""
    path = Path(name)
    if not path.exists():  # a name of the hub, or an error to be found later
        return name
    return str((find(path) if (path / FOLDER).is_dir() else path).absolute())


def open_captioner(
    name: str, decoding: Decoding, prompt: str | None, device: str | None, dtype: Precision | None
) -> Captioner:
    """A run of stage 2, a BLIP-2 of any format, or a captioning model of transformers (BLIP, GIT ...).

    Args:
        prompt: text that captions go on from; None: the model's own, if it has one.

    Raises:
        InputError: there is no such model, or it does not write captions of pictures.
    """
    if _is_foreign(name, "captioning model"):
        return TransformersCaptioner(name, decoding, prompt, device, dtype)
    pipeline = load(name, device, dtype, stage="generation")
    assert isinstance(pipeline, GenerationPipeline)
    return OwnCaptioner(pipeline, decoding, prompt)


def open_ranker(name: str, device: str | None, dtype: Precision | None) -> Ranker:
    """A run of stage 1, a BLIP-2 with its heads, or a dual encoder of transformers (CLIP, SigLIP ...).

    Raises:
        InputError: there is no such model, or it does not compare pictures and texts.
    """
    if _is_foreign(name, "image-text model"):
        return TransformersRanker(name, device, dtype)
    pipeline = load(name, device, dtype, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    return OwnRanker(pipeline)


def _is_foreign(name: str, what: str) -> bool:
    """Whether a name stands for a model of transformers that is no BLIP-2."""
    path = Path(name)
    if is_pickle(name) or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    return read_config(name, what).model_type != "blip-2"


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
        inputs.pop("token_type_ids", None)  # of BERT's tokenizer, which these models do not have
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
        inputs.pop("token_type_ids", None)  # of BERT's tokenizer, which these models do not have
        out = self._model(**inputs)
        pictures = torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
        words = torch.nn.functional.normalize(out.text_embeds.float(), dim=-1)
        parts = words.split([len(own) for own in texts])
        return [(own @ picture).tolist() for own, picture in zip(parts, pictures, strict=True)]


LEFT_OUT = r"position_ids|decoder\.(bias|weight)$"
"""Weights that files may lack: they are made, or are other weights."""


def _processor(name: str, what: str) -> Any:
    with reading(name, what, "preprocessor_config.json and tokenizer.json"):
        return load_pretrained(AutoProcessor, name)
