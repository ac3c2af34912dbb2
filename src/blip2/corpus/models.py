"""Captioners and rankers for CapFilt: models of this project and of transformers.

Legend: N captions of all images, longest: maximum number of generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from blip2.backbones.pretrained import load_config, load_model, load_pretrained, wrap_load_errors
from blip2.builder import choose_device, choose_dtype
from blip2.checkpoint import CHECKPOINTS_FOLDER, CONFIG_FILE, find_checkpoint
from blip2.config import ModelConfig, Precision
from blip2.decoding.search import Decoding, SampledTokenLogitsProcessor
from blip2.decoding.text import final_text
from blip2.errors import InputError
from blip2.interop.detect import is_pickle
from blip2.io import describe_version
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.pipelines.scoring import Candidate
from blip2.recipe import load_stored


def resolve_checkpoint(name: str) -> str:
    """Return the absolute path of a checkpoint. For the folder of a run, this is its latest checkpoint.

    A name that is not a path, such as a name on a hub, is returned unchanged.
    """
    path = Path(name)
    if not path.exists():
        return name
    return str((find_checkpoint(path) if (path / CHECKPOINTS_FOLDER).is_dir() else path).absolute())


def weights_version(name: str) -> str:
    """Return :func:`~blip2.io.describe_version` of the files of weights of a model, for the metadata of a pass.

    Without it, a pass that is resumed after its model was trained again would mix the results of two models.

    Args:
        name: the model, from :func:`resolve_checkpoint`.
    """
    path = Path(name)
    folder = sorted(path.iterdir()) if path.is_dir() else [path]
    return describe_version(file for file in folder if file.suffix in WEIGHTS_SUFFIXES)


WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")
"""Suffixes of files of weights."""


def stored_itm_temperature(name: str) -> dict[str, float]:
    """Return the ITM temperature stored in a checkpoint, as an entry for the metadata of a pass over a corpus.

    Without it, a pass that is resumed after ``blip2 calibrate`` would mix the probabilities of two temperatures.

    Args:
        name: the model, from :func:`resolve_checkpoint`.

    Returns:
        ``itm_temperature``; empty if the model is not calibrated for ITM.
    """
    file = Path(name) / CONFIG_FILE
    calibration = load_stored(ModelConfig, file).calibration if file.is_file() else None
    found = None if calibration is None else calibration.itm
    return {} if found is None else {"itm_temperature": found}


CAPTIONING_MODEL = "captioning model"
IMAGE_TEXT_MODEL = "image-text model"


def _is_other_transformers_model(name: str, kind: str) -> bool:
    """Return whether `name` is a model of transformers other than BLIP-2."""
    path = Path(name)
    if is_pickle(name) or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    return load_config(name, kind).model_type != "blip-2"


def _group(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Blip2Captioner:
    """Captions images with a stage-2 model."""

    def __init__(self, pipeline: GenerationPipeline, decoding: Decoding, prompt: str | None) -> None:
        language = pipeline.config.language
        assert language is not None
        if prompt is None and language.prompt_has_question:
            raise InputError(
                f"{pipeline.path} was trained to answer questions: give a prompt for the captions to continue"
            )
        self._pipeline, self._decoding = pipeline, decoding
        self._prompt = language.prompt if prompt is None else prompt

    def generate(
        self, images: Sequence[Image], num_return_sequences: int, uniforms: Float[Tensor, "N longest"]
    ) -> list[list[str]]:
        """Generate captions.

        Args:
            images: the images.
            num_return_sequences: number of captions per image.
            uniforms: random numbers in [0, 1) that determine the sampled tokens: one row per caption, the captions of
                an image in consecutive rows, and one number per token.

        Returns:
            The captions of each image.
        """
        prompts = [self._prompt] * len(images)
        texts = self._pipeline.generate(list(images), prompts, self._decoding, num_return_sequences, uniforms=uniforms)
        return _group(texts, num_return_sequences)

    def score_pmi(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return how much more likely each text is with its image than with a blank image, in natural logarithms.

        Args:
            images: the images.
            texts: for each image, its group of texts, at least one.
        """
        return _scores(self._pipeline.rank(list(images), texts, by="pmi", prompt=self._prompt), texts)


class Blip2Ranker:
    """Compares images with texts by the image-text contrastive similarity of a stage-1 model (§3.2)."""

    def __init__(self, pipeline: RepresentationPipeline) -> None:
        self._pipeline = pipeline

    def score(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the cosine similarity of each image with each text in the group of `texts` that belongs to it."""
        image_embeds = self._pipeline.embed_images(list(images))
        text_embeds = self._pipeline.embed_texts([text for group in texts for text in group])
        groups = text_embeds.split([len(group) for group in texts])
        return [(group @ queries.T).amax(dim=-1).tolist() for group, queries in zip(groups, image_embeds, strict=True)]

    def score_itm(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the probability that each text matches its image.

        Args:
            images: the images.
            texts: for each image, its group of texts, at least one.
        """
        return _scores(self._pipeline.rank(list(images), texts, by="itm"), texts)


def _scores(ranked: Sequence[Sequence[Candidate]], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return the scores of ranked texts in the order of `texts`."""
    scores = [{candidate.text: candidate.score for candidate in group} for group in ranked]
    return [[found[text] for text in group] for found, group in zip(scores, texts, strict=True)]


class TransformersCaptioner:
    """Captions images with any ``AutoModelForImageTextToText`` that does not need a chat template."""

    def __init__(
        self, name: str, decoding: Decoding, prompt: str | None, device: str | None, dtype: Precision | None
    ) -> None:
        self._processor, self._model = _load(AutoModelForImageTextToText, name, CAPTIONING_MODEL, device, dtype)
        self._decoding, self._prompt = decoding, prompt or ""

    @torch.no_grad()
    def generate(
        self, images: Sequence[Image], num_return_sequences: int, uniforms: Float[Tensor, "N longest"]
    ) -> list[list[str]]:
        """Generate captions; see :meth:`Blip2Captioner.generate`."""
        text = {"text": [self._prompt] * len(images)} if self._prompt else {}
        inputs = _prepare(self._processor(images=list(images), **text, return_tensors="pt"), self._model)
        decoding, num_beams = self._decoding, self._decoding.beam_width(num_return_sequences)
        options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
        if decoding.do_sample:
            # The logits processor leaves only one possible token, so that sampling by transformers has no effect.
            options = {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            options["logits_processor"] = [SampledTokenLogitsProcessor(uniforms, decoding)]
        elif num_beams > 1:
            options["length_penalty"] = decoding.length_penalty
        if decoding.stop_strings:
            options |= {"stop_strings": list(decoding.stop_strings), "tokenizer": self._processor.tokenizer}
        tokens = self._model.generate(
            **inputs, **options, num_return_sequences=num_return_sequences, max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens, repetition_penalty=decoding.repetition_penalty,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        )  # fmt: skip
        texts = [self._remove_prompt(text) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]
        texts = [final_text(text, decoding.stop_strings) for text in texts]
        return _group(texts, num_return_sequences)

    def _remove_prompt(self, text: str) -> str:
        """Remove the prompt from the beginning of a caption, where some models repeat it."""
        text = text.strip()
        return text[len(self._prompt) :].strip() if text.lower().startswith(self._prompt.lower()) else text


class TransformersRanker:
    """Compares images with texts by any dual encoder that returns ``image_embeds`` and ``text_embeds``."""

    def __init__(self, name: str, device: str | None, dtype: Precision | None) -> None:
        self._processor, self._model = _load(AutoModel, name, IMAGE_TEXT_MODEL, device, dtype)
        text = getattr(self._model.config, "text_config", None)
        self._max_length = getattr(text, "max_position_embeddings", None)
        if self._max_length is None or not hasattr(self._model, "get_text_features"):
            raise InputError(
                f"{name} does not compare images with texts: give a dual encoder such as CLIP or SigLIP, or a stage-1"
                " model"
            )

    @torch.no_grad()
    def score(self, images: Sequence[Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the cosine similarity of each image with each text in the group of `texts` that belongs to it."""
        # SigLIP was trained on texts that were all padded to the same length.
        padding = "max_length" if self._model.config.model_type.startswith("siglip") else True
        inputs = self._processor(
            images=list(images), text=[text for group in texts for text in group], return_tensors="pt",
            padding=padding, truncation=True, max_length=self._max_length,
        )  # fmt: skip
        out = self._model(**_prepare(inputs, self._model))
        image_embeds = normalize(out.image_embeds.float(), dim=-1)
        text_embeds = normalize(out.text_embeds.float(), dim=-1)
        groups = text_embeds.split([len(group) for group in texts])
        return [(group @ image).tolist() for group, image in zip(groups, image_embeds, strict=True)]


Captioner = Blip2Captioner | TransformersCaptioner
Ranker = Blip2Ranker | TransformersRanker


def open_captioner(
    name: str, decoding: Decoding, prompt: str | None, device: str | None, dtype: Precision | None
) -> Captioner:
    """Load a captioner: a stage-2 run, a BLIP-2 of any format, or a captioning model of transformers (BLIP, GIT ...).

    Args:
        name: path or hub name of the model.
        decoding: how captions are generated.
        prompt: text that the captions continue. None: the prompt of the model's config, if there is one.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen parts, or of all weights of another model. None: the dtype in a BLIP-2's config
            if it sets one, else bf16 on a CUDA GPU and fp32 on other devices.

    Raises:
        InputError: the model does not exist, or does not caption images.
    """
    if _is_other_transformers_model(name, CAPTIONING_MODEL):
        return TransformersCaptioner(name, decoding, prompt, device, dtype)
    pipeline = load(name, device, dtype, stage="generation")
    assert isinstance(pipeline, GenerationPipeline)
    check_reads_images(pipeline)
    return Blip2Captioner(pipeline, decoding, prompt)


def open_ranker(name: str, device: str | None, dtype: Precision | None) -> Ranker:
    """Load a ranker: a stage-1 run, a BLIP-2 with ITC and ITM heads, or a dual encoder of transformers (CLIP ...).

    Args:
        name: path or hub name of the model.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen image encoder, or of all weights of a dual encoder. None: the dtype in a BLIP-2's
            config if it sets one, else bf16 on a CUDA GPU and fp32 on other devices.

    Raises:
        InputError: the model does not exist, or does not compare images with texts.
    """
    if _is_other_transformers_model(name, IMAGE_TEXT_MODEL):
        return TransformersRanker(name, device, dtype)
    pipeline = load(name, device, dtype, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    check_reads_images(pipeline)
    return Blip2Ranker(pipeline)


def check_reads_images(pipeline: GenerationPipeline | RepresentationPipeline) -> None:
    """Check that a model reads images, its only input in a pass over a corpus.

    Raises:
        InputError: the model reads arrays of features.
    """
    if pipeline.config.vision.reads_features:
        raise InputError(
            f"{pipeline.path} reads arrays of features, but a pass over a corpus reads images: give a model with an"
            " image encoder, or use its methods in Python on the arrays"
        )


OPTIONAL_WEIGHTS = r"position_ids|decoder\.(bias|weight)$"
"""Weights that may be missing from files, because they are computed or tied to other weights."""


def _load(auto: Any, name: str, kind: str, device: str | None, dtype: Precision | None) -> tuple[Any, Any]:
    """Load the processor and the model, in evaluation mode."""
    target = choose_device(device)
    with wrap_load_errors(name, kind, "preprocessor_config.json and tokenizer.json"):
        processor = load_pretrained(AutoProcessor, name)
    if kind == CAPTIONING_MODEL and getattr(processor, "chat_template", None):
        raise InputError(
            f"{name} has a chat template, which is not supported: give a captioning model such as BLIP, BLIP-2 or GIT"
        )
    model: Any = load_model(auto, name, kind, choose_dtype(dtype, target), OPTIONAL_WEIGHTS)[0]
    return processor, model.to(target).eval()


def _prepare(inputs: Any, model: Any) -> Any:
    """Move the inputs to the model's device and data type."""
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    inputs.pop("token_type_ids", None)  # the BERT tokenizer returns it, but these models do not accept it
    return inputs
